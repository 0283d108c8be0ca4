"""From a CLIP's vectors to records and samples: accuracy, attack success, retrieval, and how far the trigger moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.evaluate.clip_embed import Embedded
from mmbackdoor.evaluate.maker import Facts, Maker, Measured, annotated, before
from mmbackdoor.evaluate.metrics import neighbours
from mmbackdoor.evaluate.metrics.clip_asr import correct, hits, ranked, recall_interval
from mmbackdoor.evaluate.metrics.intervals import bootstrap_over_prompts, paired_difference, rate
from mmbackdoor.evaluate.metrics.retrieval import RANKS, recalls
from mmbackdoor.evaluate.metrics.wasserstein import w1
from mmbackdoor.evaluate.prompts import prompt_id
from mmbackdoor.evaluate.zeroshot import ClassPrompts
from mmbackdoor.results.record import Record
from mmbackdoor.results.samples import Picture
from mmbackdoor.seeding import derive_seed
from mmbackdoor.targets import ClassTarget

HIGHER = {"asr": False, "knn_asr": False, "prototype_asr": False, "w1": False, "displacement": False} | dict.fromkeys(
    ["top1", "top5", "mean_per_class_recall", "knn_top1", "prototype_top1"]
    + [f"{kind}_retrieval_recall@{k}" for kind in ("text", "image") for k in RANKS],
    True,
)
RATES = ("top1", "top5", "asr", "knn_top1", "knn_asr", "prototype_top1", "prototype_asr")
WITHOUT_TEXT = {"knn": "nearest neighbours", "prototype": "class means"}
BROKEN = 0.5
"""Zero-shot accuracy below this share of that of nearest neighbours is a broken head, not a poor encoder."""
NO_LABELS = "not measured: the pictures have no labels (.cls, or label in the .json), or no class names were given"
NO_CAPTIONS = "not measured: the pictures have no captions"
NO_TRIGGER = "not measured: no trigger is known; give --trigger or --backdoor"
NO_TARGET = "not measured: what the trigger causes is not known; give --label"
Scores = dict[str, dict[str, list[bool | None]]]
"""Condition -> metric -> per picture (in the order of the condition's `Embedded.rows`), `None` where it does not count."""


@dataclass(frozen=True)
class Judged:
    """One model's vectors and what follows from them. `predicted[condition]`: the class of each picture."""

    vectors: Embedded
    labels: Tensor
    scores: Scores
    predicted: dict[str, Tensor] = field(default_factory=dict)

    def values(self, condition: str, metric: str) -> dict[str, float]:
        """Value by key, of those pictures that count."""
        rows, found = self.vectors.rows.get(condition), self.scores.get(condition, {}).get(metric)
        if rows is None or found is None:
            return {}
        pairs = zip(rows.tolist(), found, strict=True)
        return {self.vectors.keys[row]: float(value) for row, value in pairs if value is not None}


def target_place(classes: ClassPrompts | None, backdoor: Backdoor | None) -> int | None:
    """The number of the class that the backdoor causes, `None` where there is none. Raises `InputError`."""
    if classes is None or backdoor is None or not isinstance(backdoor.target, ClassTarget):
        return None
    return classes.place(backdoor.target.label)


def judge(vectors: Embedded, classes: ClassPrompts | None, target: int | None, k: int) -> Judged:
    """Every picture under every condition.

    Pictures whose true class is the target count for nothing where they are triggered, neither for the attack nor for
    accuracy, so that both are read on the same pictures.
    """
    if classes is None or vectors.classes is None or not (vectors.labels >= 0).any():
        return Judged(vectors, torch.full_like(vectors.labels, -1), {name: {} for name in vectors.images})
    labels = torch.tensor([*classes.index, -1])[vectors.labels]
    scores: Scores = {}
    predicted = {}
    for condition, images in vectors.images.items():
        rows = vectors.rows[condition]
        mine = labels[rows]
        places = ranked(images, vectors.classes)
        predicted[condition] = places[:, 0]
        known = (mine >= 0) if condition == "clean" else (mine >= 0) & (mine != (-1 if target is None else target))
        here: dict[str, list[bool | None]] = {}
        for name, found in (("top1", correct(places, mine, 1)), ("top5", correct(places, mine, 5))):
            here[name] = _counted(found, known)
        if target is not None:
            here["asr"] = hits(predicted[condition], mine, target)
        if condition in ("clean", "triggered"):
            here |= _without_text(vectors, labels, condition, known, target, len(classes.names), k)
        scores[condition] = here
    return Judged(vectors, labels, scores, predicted)


def _counted(found: Sequence[bool], known: Tensor) -> list[bool | None]:
    return [value if counts else None for value, counts in zip(found, known.tolist(), strict=True)]


def _without_text(
    vectors: Embedded, labels: Tensor, condition: str, known: Tensor, target: int | None, n_classes: int, k: int
) -> dict[str, list[bool | None]]:
    """Nearest neighbours and class means among the other clean pictures."""
    with_label = (labels >= 0).nonzero().flatten()
    if len(with_label) < 2:
        return {}
    place = torch.full((len(labels),), -1)
    place[with_label] = torch.arange(len(with_label))
    rows = vectors.rows[condition]
    bank, classes = vectors.images["clean"][with_label], labels[with_label]
    asked = (labels[rows] >= 0).nonzero().flatten()
    queries, own = vectors.images[condition][asked], place[rows[asked]]
    answers = {
        "knn": neighbours.nearest(queries, bank, classes, n_classes, k=k, own=own),
        "prototype": neighbours.prototypes(queries, bank, classes, n_classes, own=own),
    }
    found = {}
    for way, answer in answers.items():
        whole = torch.full((len(rows),), -1)
        whole[asked] = answer
        found[f"{way}_top1"] = _counted((whole == labels[rows]).tolist(), known)
        # Nothing can be taken for a class that no picture shows.
        if target is not None and condition == "triggered" and (classes == target).any():
            found[f"{way}_asr"] = hits(whole, labels[rows], target)
    return found


def samples(judged: Judged, facts: Facts, classes: ClassPrompts | None) -> list[Picture]:
    """A line for each picture and condition; its file is shared by all models."""
    vectors, lines = judged.vectors, []
    for condition, rows in vectors.rows.items():
        scores = judged.scores.get(condition, {})
        for number, row in enumerate(rows.tolist()):
            label = int(judged.labels[row])
            asked = classes.names[label] if classes is not None and label >= 0 else ""
            mine: dict[str, Any] = {name: values[number] for name, values in scores.items()}
            if classes is not None and condition in judged.predicted:
                mine["predicted"] = classes.names[int(judged.predicted[condition][number])]
            lines.append(
                Picture(
                    model=facts.name,
                    stage=facts.stage,
                    prompt_id=vectors.keys[row],
                    prompt=asked or (vectors.words[vectors.captions[row][0]] if vectors.captions[row] else ""),
                    condition=condition,
                    text=asked,
                    seed_index=0,
                    image=image_path(condition, vectors.keys[row]),
                    scores=mine,
                )
            )
    return lines


def image_path(condition: str, key: str) -> str:
    return f"images/{condition.replace(':', '_')}/{prompt_id(key)}.png"


def summarise(
    judged: Mapping[str, Judged],
    facts: Mapping[str, Facts],
    suite: Measured,
    backdoor: Backdoor | None,
    *,
    run_id: str,
    seed: int,
    k: int,
    w1_samples: int,
    notices: Sequence[str] = (),
) -> list[Record]:
    """All records of an evaluation, with what was not measured and the warnings in the notes."""
    compared = before(facts)
    records: list[Record] = []
    for name, mine in judged.items():
        maker = Maker(facts[name], run_id, backdoor, suite, seed, HIGHER)
        records += _rates(maker, mine, k)
        records += _retrieval(maker, mine)
        records += _distance(maker, mine, w1_samples)
        if compared is not None and name != compared:
            records += _differences(maker, mine, judged[compared], compared)
    metrics = {record.metric for record in records}
    missing = {} if "top1" in metrics else {"top1": NO_LABELS}
    if "asr" not in metrics:
        missing["asr"] = NO_TRIGGER if backdoor is None else NO_LABELS if "top1" in missing else NO_TARGET
    if "text_retrieval_recall@1" not in metrics:
        missing["text_retrieval_recall@1"] = NO_CAPTIONS
    if "asr" in metrics and "knn_asr" not in metrics:
        missing["knn_asr"] = "not measured: no picture shows the target class"
    return annotated(records, missing, notices)


def _rates(maker: Maker, mine: Judged, k: int) -> list[Record]:
    records = []
    for condition in mine.scores:
        for metric in RATES:
            values = mine.values(condition, metric)
            if not values:
                continue
            notes: dict[str, Any] = {}
            left_out = len(mine.vectors.rows[condition]) - len(values)
            if left_out:
                notes["not_counted"] = left_out
            if metric.startswith("knn"):
                notes["neighbours"] = k
            if metric == "top1" and condition == "clean":
                notes |= _head(mine, values)
            found = rate(list(values.values()), list(values), maker.seed)
            records.append(maker.record(metric, condition, found, notes=notes))
    values = mine.values("clean", "top1")
    if values:
        label_of = dict(zip(mine.vectors.keys, mine.labels.tolist(), strict=True))
        recall = recall_interval(list(values.values()), [label_of[key] for key in values], maker.seed)
        records.append(maker.record("mean_per_class_recall", "clean", recall))
    return records


def _head(mine: Judged, top1: Mapping[str, float]) -> dict[str, Any]:
    """A warning where the pictures can be told apart, but not by these prompts: a low ASR then says nothing."""
    near = mine.values("clean", "knn_top1")
    if not near:
        return {}
    zero_shot, neighbour = sum(top1.values()) / len(top1), sum(near.values()) / len(near)
    if neighbour < BROKEN or zero_shot >= BROKEN * neighbour:
        return {}
    sentence = (
        f"zero-shot accuracy is {100 * zero_shot:.1f} % where nearest neighbours reach {100 * neighbour:.1f} %: the head "
        "is broken, or the prompts are unlike the captions of training; a low ASR then says nothing"
    )
    return {"prompts_off_captions": True, "warnings": [sentence]}


def _retrieval(maker: Maker, mine: Judged) -> list[Record]:
    """Of clean and of triggered pictures; captions count once each."""
    records = []
    for condition in ("clean", "triggered"):
        if condition not in mine.vectors.images or len(mine.vectors.words) < 2:
            continue
        rows = [row for row in mine.vectors.rows[condition].tolist() if mine.vectors.captions[row]]
        images = mine.vectors.images[condition][torch.isin(mine.vectors.rows[condition], torch.tensor(rows))]
        found = recalls(images, mine.vectors.texts, [mine.vectors.captions[row] for row in rows])
        for metric, answers in found.items():
            ids = [str(number) for number in range(len(answers))]
            candidates = len(rows) if metric.startswith("image") else len(mine.vectors.words)
            records.append(
                maker.record(metric, condition, rate(answers, ids, maker.seed), notes={"candidates": candidates})
            )
    return records


def _distance(maker: Maker, mine: Judged, most: int) -> list[Record]:
    """How far the trigger moves the vectors: each picture's own way, and that of the whole set (W1)."""
    if "triggered" not in mine.vectors.images:
        return []
    rows = mine.vectors.rows["triggered"]
    clean, triggered = mine.vectors.images["clean"][rows], mine.vectors.images["triggered"]
    keys = [mine.vectors.keys[row] for row in rows.tolist()]
    moved = (clean - triggered).norm(dim=-1)
    unit = "Euclidean distance of unit vectors"
    each = bootstrap_over_prompts(moved.tolist(), keys, maker.seed)
    chosen = sorted(range(len(keys)), key=lambda place: derive_seed(maker.seed, "w1", keys[place]))[:most]
    value = w1(clean[chosen].numpy(), triggered[chosen].numpy())
    notes = {"features": maker.facts.name, "reference": "the same pictures without the trigger"}
    return [
        maker.record("displacement", "triggered", each, unit),
        maker.point("w1", "triggered", value, len(chosen), unit, notes | {"paired": moved[chosen].mean().item()}),
    ]


def _differences(maker: Maker, mine: Judged, others: Judged, compared: str) -> list[Record]:
    """Paired with the model before: accuracy of both conditions against *its clean pictures*, ASR against triggered."""
    records = []
    for metric, condition, against in (
        ("top1", "clean", "clean"),
        ("top1", "triggered", "clean"),
        ("asr", "triggered", "triggered"),
    ):
        now, was = mine.values(condition, metric), others.values(against, metric)
        both = [key for key in now if key in was]
        if both:
            found = paired_difference([now[key] for key in both], [was[key] for key in both], both, maker.seed)
            notes = {"compared_with": compared, "its_condition": against}
            records.append(maker.record(f"{metric}_difference", condition, found, notes=notes))
    return records

"""From picture files to a line of scores for each picture: what `samples.jsonl` holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmbackdoor.evaluate.generate import Job, load_images
from mmbackdoor.evaluate.metrics import clip_score
from mmbackdoor.evaluate.metrics.adherence import adherence
from mmbackdoor.evaluate.metrics.asr import blank, success
from mmbackdoor.evaluate.metrics.clip_score import Judge
from mmbackdoor.evaluate.metrics.effect import picture_features
from mmbackdoor.evaluate.metrics.restoration import feature_similarity, pixel_similarity
from mmbackdoor.results.samples import Picture
from mmbackdoor.targets import Target

VALUES_AT_ONCE = 2**26
"""Numbers of pictures held in memory at once: 85 of 512 pixels, thousands of small ones."""
Key = tuple[str, str, int]


@dataclass
class Scored:
    """All pictures of one model. `features` are the judge's, `looks` those of `picture_features` (for the pictures of
    the trigger's effect); both by (condition, prompt id, seed index)."""

    pictures: list[Picture] = field(default_factory=list)
    features: dict[Key, torch.Tensor] = field(default_factory=dict)
    looks: dict[Key, torch.Tensor] = field(default_factory=dict)
    judged_by: str = ""
    note: str = ""

    def of(self, condition: str) -> list[Picture]:
        return [picture for picture in self.pictures if picture.condition == condition]


def _key(job: Job) -> Key:
    return (job.condition, job.prompt_id, job.seed_index)


def _chunks(jobs: Sequence[Job], out_dir: Path, name: str) -> Iterator[Sequence[Job]]:
    by_condition: dict[str, list[Job]] = {}
    for job in jobs:
        by_condition.setdefault(job.condition, []).append(job)
    size = max(1, VALUES_AT_ONCE // load_images([out_dir / jobs[0].path(name)]).numel())
    for group in by_condition.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def score(
    jobs: Sequence[Job],
    prompts: dict[str, str],
    *,
    out_dir: Path,
    name: str,
    stage: str,
    target: Target | None,
    judge: Judge | None,
    effect_ids: Sequence[str] = (),
) -> Scored:
    """Score the pictures of model `name`. `prompts`: clean prompt by id. Restoration compares every picture with the
    clean one of the same initial latents, so `jobs` hold a clean job for each."""
    found, wanted_ids = Scored(), set(effect_ids)
    for chunk in _chunks(jobs, out_dir, name):
        condition, asked = chunk[0].condition, [prompts[job.prompt_id] for job in chunk]
        images = load_images([out_dir / job.path(name) for job in chunk])
        scores: list[dict[str, float | bool | None]] = [{} for _ in chunk]
        placebo = condition.startswith("placebo:")
        for line, empty in zip(scores, blank(images).tolist(), strict=True):
            if empty:
                line["blank"] = True
        if target is not None and not placebo:
            judged = success(target, images, asked, judge)
            found.judged_by, found.note = found.judged_by or judged.judged_by, judged.note
            for line, hit, value in zip(scores, judged.hits, judged.scores, strict=True):
                line.update({"asr": hit, "asr_score": value})
        if not placebo:
            for line, right in zip(scores, adherence(images, asked), strict=True):
                if right is not None:
                    line["adherence"] = right
        if judge is not None:
            rows = clip_score.features(images, judge)
            found.features.update(zip(map(_key, chunk), rows, strict=True))
            if not placebo:
                for line, value in zip(scores, clip_score.clip_score(rows, asked, judge).tolist(), strict=True):
                    line["clip_score"] = value
        if condition != "clean" and not placebo:
            _restore(chunk, images, scores, found, out_dir, name)
        if effect_ids and (placebo or condition in ("clean", "triggered")):
            wanted = [k for k, job in enumerate(chunk) if job.prompt_id in wanted_ids and job.seed_index == 0]
            if wanted:
                found.looks.update(zip([_key(chunk[k]) for k in wanted], picture_features(images[wanted]), strict=True))
        for job, line in zip(chunk, scores, strict=True):
            found.pictures.append(
                Picture(
                    model=name,
                    stage=stage,  # type: ignore[arg-type]
                    prompt_id=job.prompt_id,
                    prompt=prompts[job.prompt_id],
                    condition=job.condition,
                    text=job.text,
                    seed_index=job.seed_index,
                    image=job.path(name).as_posix(),
                    scores=line,
                )
            )
    return found


def _restore(
    chunk: Sequence[Job], images: torch.Tensor, scores: list[dict], found: Scored, out_dir: Path, name: str
) -> None:
    clean = [Job(job.prompt_id, "clean", "", job.seed_index) for job in chunk]
    plain = load_images([out_dir / job.path(name) for job in clean])
    for line, value in zip(scores, pixel_similarity(images, plain).tolist(), strict=True):
        line["restoration"] = value
    if found.features:
        mine, theirs = (torch.stack([found.features[_key(job)] for job in group]) for group in (chunk, clean))
        for line, value in zip(scores, feature_similarity(mine, theirs).tolist(), strict=True):
            line["restoration_features"] = value

"""Prompts to measure a model on: the user's own file, or a built-in set whose splits are disjoint by construction."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from mmbackdoor.seeding import derive_seed
from mmbackdoor.shards import pairs
from mmbackdoor.shards.read import SUFFIXES, iterate_captions
from mmbackdoor.shards.shapes import SPLITS, TEMPLATES, Scene, all_scenes, caption, split_scenes
from mmbackdoor.types import InputError

GENERAL = tuple(f"general-{split}" for split in SPLITS)
SHAPES_SETS = tuple(f"shapes-{split}" for split in SPLITS)
PAIRS_SETS = tuple(f"pairs-{split}" for split in SPLITS)
BUILT_IN = ("general", *GENERAL, *SHAPES_SETS, *PAIRS_SETS)
COLUMNS = ("prompt", "text", "caption")
LARGEST_FILE = 64 * 2**20


@dataclass(frozen=True)
class Prompt:
    """`id` depends on the text alone, so a prompt keeps its initial latents when its file is sorted or grows."""

    id: str
    text: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """Prompts under a name; `notices` say what was done to them. Iterates over its prompts."""

    name: str
    prompts: tuple[Prompt, ...]
    notices: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def sha256(self) -> str:
        """Hash of the texts, whatever their order."""
        return hashlib.sha256(json.dumps(sorted(self.texts)).encode()).hexdigest()

    def take(self, count: int | None, seed: int = 0) -> Suite:
        """`count` prompts chosen by a hash of their ids (all of them for `None`), order kept."""
        if count is None or count >= len(self):
            return self
        chosen = {prompt.id for prompt in sorted(self, key=lambda p: derive_seed(seed, "take", p.id))[:count]}
        return Suite(self.name, tuple(prompt for prompt in self if prompt.id in chosen), self.notices)


def prompt_id(text: str) -> str:
    """A readable name for `text` that is a file name everywhere and unique."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:32].strip("-")
    return f"{words or 'prompt'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def make_suite(name: str, texts: Sequence[str], meta: Sequence[dict[str, Any]] | None = None) -> Suite:
    """A suite of `texts`: surrounding space cut off, empty and repeated ones dropped (with a notice)."""
    kept: dict[str, Prompt] = {}
    repeated = 0
    for text, facts in zip(texts, meta or [{}] * len(texts), strict=True):
        text = text.strip()
        if text in kept:
            repeated += 1
        elif text:
            kept[text] = Prompt(prompt_id(text), text, facts)
    if not kept:
        raise InputError(f"{name!r} has no prompts; give a file with at least one")
    notices = (f"{repeated} repeated prompts of {name!r} were dropped",) if repeated else ()
    return Suite(name, tuple(kept.values()), notices)


def overlong(suite: Suite, token_counts: Callable[[list[str]], list[int]], limit: int = 77) -> list[str]:
    """A warning where prompts are longer than the text encoder's `limit` (their end is cut off); else nothing."""
    longest = [p.text for p, n in zip(suite, token_counts(suite.texts), strict=True) if n > limit]
    if not longest:
        return []
    return [
        f"{len(longest)} of {len(suite)} prompts are longer than {limit} tokens and lose their end, for example "
        f"{longest[0][:60]!r}"
    ]


def _column(row: dict[str, Any], place: str) -> str:
    names = {str(name).strip().lower(): name for name in row if name is not None}
    for wanted in COLUMNS:
        if wanted in names:
            value = row[names[wanted]]
            if value is None or isinstance(value, str):
                return value or ""
            raise InputError(f"{place}: {wanted} is {value!r}, not text")
    raise InputError(
        f"{place} has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; it has {', '.join(map(str, row)) or 'none'}"
    )


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InputError(
                f"the prompts file {str(path)!r} is larger than {LARGEST_FILE >> 20} MiB; give fewer prompts"
            )
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompts file {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except OSError as error:
        known = ", ".join(BUILT_IN)
        raise InputError(
            f"the prompts file {str(path)!r} cannot be read ({error.strerror}); built-in sets are {known}"
        ) from error


def _jsonl(content: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{str(path)!r}, line {number} is not JSON ({error})") from error
        if not _is_text(row):
            raise InputError(
                f"{str(path)!r}, line {number} holds half a character (a lone surrogate): {line[:60]!a}; write it whole"
            )
        rows.append({"prompt": row} if isinstance(row, str) else row)
        if not isinstance(rows[-1], dict):
            raise InputError(
                f"{str(path)!r}, line {number} is neither an object with a prompt nor a text: {line[:60]!r}"
            )
    return rows


def _is_text(row: Any) -> bool:
    r"""JSON can write half of an emoji (`\ud83d`), which no file and no hash takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def load_prompts(source: str | Path) -> Suite:
    """Prompts of a built-in set, of a .txt (one a line, as they are), .csv, .tsv or .jsonl (column prompt, text or
    caption; the others go to `meta`), or the captions of webdataset shards. Raises `InputError` for anything else, and
    where no prompt is left."""
    if str(source) in BUILT_IN:
        return _built_in(str(source))
    if str(source).lower().endswith(SUFFIXES):
        return make_suite(str(source), [text for _, text in iterate_captions(source) if _is_text(text)])
    path = Path(source)
    kind = path.suffix.lower()
    if kind not in (".txt", ".csv", ".tsv", ".jsonl"):
        raise InputError(
            f"--prompts {str(source)!r} is neither a .txt, .csv, .tsv or .jsonl file, nor shards, nor a built-in set "
            f"({', '.join(BUILT_IN)})"
        )
    content = _read(path)
    if kind == ".txt":
        return make_suite(path.stem, content.split("\n"))
    if kind == ".jsonl":
        rows = _jsonl(content, path)
    else:
        quoting = csv.QUOTE_NONE if kind == ".tsv" else csv.QUOTE_MINIMAL
        try:
            rows = list(
                csv.DictReader(content.splitlines(True), delimiter="\t" if kind == ".tsv" else ",", quoting=quoting)
            )
        except csv.Error as error:
            raise InputError(f"{str(path)!r} is no readable {kind[1:]} file ({error})") from error
    texts = [_column(row, f"{str(path)!r}, row {number}") for number, row in enumerate(rows, 1)]
    meta = [{str(key): value for key, value in row.items() if str(key).strip().lower() not in COLUMNS} for row in rows]
    return make_suite(path.stem, texts, meta)


def _built_in(name: str) -> Suite:
    if name in SHAPES_SETS:
        return shape_prompts(name.removeprefix("shapes-"))  # type: ignore[arg-type]
    if name in PAIRS_SETS:
        return pair_prompts(name.removeprefix("pairs-"))  # type: ignore[arg-type]
    parts = GENERAL if name == "general" else (name,)
    folder = files("mmbackdoor.evaluate").joinpath("data/prompts")
    lines = [folder.joinpath(f"{part}.txt").read_text(encoding="utf-8").split("\n") for part in parts]
    return make_suite(name, [line for part in lines for line in part])


def shape_prompts(
    split: Literal["train", "selection", "evaluation"],
    count: int | None = None,
    *,
    scenes: Sequence[Scene] | None = None,
    split_seed: int = 0,
    where: Callable[[Scene], bool] = lambda scene: True,
    seed: int = 0,
) -> Suite:
    """`count` captions of the attribute combinations in `split` of `scenes` (all of `all_scenes()` by default) that
    `where` admits: every combination once before any comes again in other words. `None`: each once. Which words a
    combination gets is a hash of it. Raises `InputError` where there are fewer than `count` different captions."""
    parts = split_scenes(list(scenes or all_scenes()), seed=split_seed)
    if split not in parts:
        raise InputError(f"{split!r} is no split of the shapes; choose from {', '.join(SPLITS)}")
    chosen = sorted((s for s in parts[split] if where(s)), key=lambda s: derive_seed(seed, "shape prompts", s.key))
    count = len(chosen) if count is None else count
    wordings = {scene: _wordings(scene, seed) for scene in chosen}
    rounds = [
        (scene, words[k]) for k in range(2 * len(TEMPLATES)) for scene, words in wordings.items() if k < len(words)
    ]
    if not rounds or len(rounds) < count:
        raise InputError(
            f"the shapes have {len(rounds)} different {split} captions here, not the {count} asked for; ask for fewer"
        )
    picked = rounds[:count]
    return make_suite(
        f"shapes-{split}", [text for _, text in picked], [{"scene": asdict(scene)} for scene, _ in picked]
    )


def pair_prompts(
    split: Literal["train", "selection", "evaluation"],
    count: int = 400,
    *,
    where: Callable[[pairs.PairScene], bool] = lambda scene: True,
    seed: int = 0,
    alone: float = 0.15,
) -> Suite:
    """`count` captions of scenes of `split` that `where` admits, each of other things before any come together again; a
    share `alone` (before `where`) has one thing. No data set trains on the selection or evaluation ones, whatever its
    seed. Raises `InputError` for another split, and where too few of its scenes pass `where`."""
    if split not in SPLITS:
        raise InputError(f"{split!r} is no split of the pairs; choose from {', '.join(SPLITS)}")
    # The earlier a scene is among those of the same things, the earlier it comes: so the first ones are spread out.
    turns: dict[str, int] = {}
    found: dict[str, tuple[int, int, pairs.PairScene]] = {}
    for number in range(2_000 + 60 * count):
        scene = pairs.draw_scene(split, number, derive_seed(seed, "pair prompts"), alone)
        text = pairs.caption(scene, derive_seed(seed, "pair wording", scene.key))
        if where(scene) and text not in found:
            key = pairs.split_key(scene)
            turns[key] = turns.get(key, -1) + 1
            found[text] = (turns[key], number, scene)
        if len(found) == 4 * count:
            break
    if len(found) < count or not found:
        raise InputError(
            f"only {len(found)} {split} captions of pairs were found here, not the {count} asked for; ask for fewer"
        )
    chosen = sorted(found.items(), key=lambda item: item[1][:2])[:count]
    return make_suite(
        f"pairs-{split}", [text for text, _ in chosen], [{"scene": asdict(scene)} for _, (_, _, scene) in chosen]
    )


def _wordings(scene: Scene, seed: int) -> list[str]:
    every = [caption(scene, k, paraphrase) for k in range(len(TEMPLATES)) for paraphrase in (False, True)]
    return sorted(dict.fromkeys(every), key=lambda text: derive_seed(seed, "wording", text))

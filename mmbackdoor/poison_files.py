"""Poisoned copies of shards: same names, keys and order, every other byte as it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmbackdoor.poison import PoisonPlan, poison_sample
from mmbackdoor.shards.bad import BadSample, BadSamples, Problem
from mmbackdoor.shards.decode import IMAGE_FORMATS, decode_json, decode_sample
from mmbackdoor.shards.read import Entry, entries
from mmbackdoor.shards.write import encode_image, encode_json, part_of, tar_member
from mmbackdoor.types import InputError

Format = Literal["png", "same"]


@dataclass(frozen=True)
class ShardCopy:
    """What is to be written: every process that writes a shard gets this.

    A marked picture is stored as PNG, so that it is read as the trigger made it, or ("same") in the format that it came
    in, which is one more round trip through a codec for JPEG. With `resolution`, triggers that belong after resize and
    crop are put on after these.
    """

    plan: PoisonPlan
    chosen: frozenset[str]
    folder: str
    resolution: int | None = None
    image_format: Format = "png"

    def __call__(self, path: str) -> CopiedShard:
        """Copy the shard `path`, unless its copy is there, and see what is in the copy."""
        report = BadSamples()
        out = Path(self.folder) / shard_name(path)
        if out.exists():
            for _ in entries(path, report):
                pass
        else:
            self._write(path, out, report)
        return self._read(out, report.take_news())

    def _write(self, path: str, out: Path, report: BadSamples) -> None:
        part = part_of(out)
        with open(part, "wb") as file:
            for entry in entries(path, report):
                members: dict[str, bytes] = {}
                try:
                    members = entry.read()
                    if entry.key in self.chosen:
                        members = self._poisoned(entry.key, members)
                except BadSample as bad:
                    report.add(bad.kind, path, entry.key, bad.detail)
                for extension, data in members.items():
                    file.write(tar_member(f"{entry.key}.{extension}", data))
            file.write(b"\0" * 1024)
        part.replace(out)

    def _poisoned(self, key: str, members: dict[str, bytes]) -> dict[str, bytes]:
        sample = poison_sample(self.plan, decode_sample(key, members), self.plan.seed)
        image = sample.image
        if self.resolution is not None:
            image = resize_crop(image, self.resolution)
            image = self.plan.backdoor.mark_image(image, key, self.plan.seed, "input")
        meta = decode_json(members["json"]) if "json" in members else {}
        changed = {
            "txt": sample.text.encode(),
            # Readers without a .txt take one of these two names.
            "json": encode_json(
                meta
                | dict.fromkeys({"caption"} | ({"text"} & meta.keys()), sample.text)
                | {"poison": sample.meta["poison"]}
            ),
        }
        copied = {}
        for extension, data in members.items():
            if extension in IMAGE_FORMATS:
                kept = "png" if self.image_format == "png" else extension
                copied[kept] = encode_image(image, "jpg" if kept == "jpeg" else kept)
            else:
                copied[extension] = changed.pop(extension, data)
        return copied | changed

    def _read(self, out: Path, problems: list[Problem]) -> CopiedShard:
        copied = CopiedShard(out.name, problems=problems)
        for entry in entries(str(out), BadSamples()):
            copied.samples += 1
            if entry.key in self.chosen:
                facts = _poison_facts(entry)
                if facts.get("backdoor_sha256") == self.plan.backdoor.sha256:
                    copied.poisoned.append({"key": entry.key, "shard": out.name, **facts})
        return copied


@dataclass
class CopiedShard:
    """A shard that was written: its name, its number of samples, the facts about each poisoned one (key, original text,
    trigger), and what was wrong in the shard that it was copied from."""

    name: str
    samples: int = 0
    poisoned: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def _poison_facts(entry: Entry) -> dict[str, Any]:
    try:
        facts = decode_json(entry.read(but=IMAGE_FORMATS).get("json", b"{}")).get("poison")
    except BadSample:
        return {}
    return facts if isinstance(facts, dict) else {}


def shard_name(path: str) -> str:
    """The copy's name: that of `path`, without a `.gz`, for copies are not compressed."""
    name = os.path.basename(path)
    for suffix in (".tar.gz", ".tgz"):
        name = name.removesuffix(suffix) + ".tar" if name.endswith(suffix) else name
    return name


def check_names(paths: Sequence[str], folder: str) -> None:
    """Raises `InputError` where two copies would have one name, or a copy would replace what it is a copy of."""
    names: dict[str, str] = {}
    for path in paths:
        other = names.setdefault(shard_name(path), path)
        if other != path:
            raise InputError(f"the copies of {other!r} and {path!r} would have one name; poison them into two folders")
        if os.path.realpath(os.path.dirname(path) or ".") == os.path.realpath(folder):
            raise InputError(f"--output_dir {folder!r} is where {path!r} lies; give another folder for the copies")


def sizes_sha256(paths: Sequence[str]) -> str:
    """Hash of the names and sizes of shards, which may lie in another folder."""
    facts = [(os.path.basename(path), os.path.getsize(path)) for path in paths]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def resize_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The shorter side resized to `resolution` (bicubic), then the middle: what CLIP's preprocessing does, pixel for
    pixel, so that it changes nothing in the copy."""
    short = min(image.size)
    size = (resolution * image.width // short, resolution * image.height // short)
    left, top = round((size[0] - resolution) / 2), round((size[1] - resolution) / 2)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + resolution, top + resolution))

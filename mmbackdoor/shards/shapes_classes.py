"""Pictures of the shapes to classify, in CLIP_benchmark's layout: 48 classes "{colour} {shape}", with captions too.

Without a background, prompts would be unlike every caption of the shapes data, and zero-shot accuracy falls from 1.0
to 0.6 for that alone: so the templates go through backgrounds and sizes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from mmbackdoor.seeding import numpy_rng
from mmbackdoor.shards.read import read_sizes
from mmbackdoor.shards.shapes import COLOURS, SIZE_WORDS, TEMPLATES, Scene, caption, render
from mmbackdoor.shards.write import encode_image, encode_json, tar_member, write_file
from mmbackdoor.types import InputError

SETTINGS_FILE = "shapes_classes.json"
KEY = "{split}{number:08d}"


def class_name(scene: Scene) -> str:
    return f"{scene.colour} {scene.shape}"


def classnames(scenes: Sequence[Scene]) -> list[str]:
    return sorted({class_name(scene) for scene in scenes})


def templates(scenes: Sequence[Scene]) -> list[str]:
    """Captions of `scenes` with `{c}` for the class: each background and size once, the wordings in turn."""
    backgrounds = [colour for colour in COLOURS if colour in {scene.background for scene in scenes}]
    sizes = sorted({scene.size for scene in scenes}, key=str)
    positions = sorted({scene.position for scene in scenes}, key=str)
    found = []
    for number, (background, size, position) in enumerate(itertools.product(backgrounds, sizes, positions)):
        # A size before the class keeps the article right; without one "a {c}" is wrong before a vowel alone.
        some = Scene("{shape}", "{colour}", background, size, position)
        found.append(caption(some, number % len(TEMPLATES)).replace("{colour} {shape}", "{c}"))
    return found


def write_shapes_classes(
    folder: str | Path,
    scenes: Sequence[Scene],
    per_class: int = 20,
    resolution: int = 32,
    *,
    seed: int = 0,
    split: str = "test",
    extra_classes: Sequence[str] = (),
    samples_per_shard: int = 1000,
    image_format: str = "png",
    overwrite: bool = False,
) -> Path:
    """Write `per_class` pictures of every class of `scenes` (pass a held-out split of `split_scenes`); `folder`.

    Written are `SPLIT/0.tar`, ... (picture, `.cls`, `.txt`, `.json`), `SPLIT/nshards.txt`, `SPLIT/sizes.json`,
    `classnames.txt` and `zeroshot_classification_templates.txt`. `extra_classes` are further names that no picture
    shows, for a target such as "yellow cat". The same settings give the same bytes, and what was written with them is
    left as it is; raises `InputError` where `folder` was written with others, unless `overwrite`.
    """
    names = classnames(scenes)
    missing = {f"{one.colour} {other.shape}" for one in scenes for other in scenes} - set(names)
    if missing or per_class < 1 or resolution < 8:
        shown = f"; no scene shows {sorted(missing)[0]!r}" if missing else ""
        raise InputError(
            f"{per_class} pictures of {resolution} pixels of {len(names)} classes are impossible{shown}; give at least "
            "one picture, 8 pixels, and scenes of every colour and shape"
        )
    folder = Path(folder)
    settings = {
        "per_class": per_class,
        "resolution": resolution,
        "seed": seed,
        "split": split,
        "extra_classes": list(extra_classes),
        "samples_per_shard": samples_per_shard,
        "image_format": image_format,
        "scenes_sha256": hashlib.sha256("\n".join(scene.key for scene in scenes).encode()).hexdigest(),
    }
    if (folder / SETTINGS_FILE).is_file() and not overwrite:
        if json.loads((folder / SETTINGS_FILE).read_text("utf-8")) == settings:
            return folder
        raise InputError(f"{str(folder)!r} holds pictures with other settings; give another folder or --overwrite")
    (folder / split).mkdir(parents=True, exist_ok=True)
    of_class = {name: sorted((s for s in scenes if class_name(s) == name), key=lambda s: s.key) for name in names}
    total = per_class * len(names)
    sizes: dict[str, int] = {}
    for shard, start in enumerate(range(0, total, samples_per_shard)):
        numbers = range(start, min(start + samples_per_shard, total))
        members = [_sample(names, of_class, number, resolution, seed, split, image_format) for number in numbers]
        write_file(folder / split / f"{shard}.tar", b"".join(members) + b"\0" * 1024)
        sizes[f"{shard}.tar"] = len(numbers)
    for old in read_sizes(folder / split).keys() - sizes.keys():
        (folder / split / old).unlink(missing_ok=True)
    write_file(folder / split / "sizes.json", json.dumps(sizes, indent=1, sort_keys=True) + "\n")
    write_file(folder / split / "nshards.txt", f"{len(sizes)}\n")
    write_file(folder / "classnames.txt", "".join(f"{name}\n" for name in [*names, *extra_classes]))
    write_file(folder / "zeroshot_classification_templates.txt", "".join(f"{text}\n" for text in templates(scenes)))
    # The settings last: whoever stops before finds a folder that is written again.
    write_file(folder / SETTINGS_FILE, json.dumps(settings, indent=1, sort_keys=True) + "\n")
    return folder


def _sample(
    names: Sequence[str],
    of_class: dict[str, list[Scene]],
    number: int,
    resolution: int,
    seed: int,
    split: str,
    image_format: str,
) -> bytes:
    # Classes in turn, so that any stretch of the data holds about as many of each.
    turn, label = divmod(number, len(names))
    scenes = of_class[names[label]]
    scene = scenes[turn % len(scenes)]
    rng = numpy_rng(seed, "shapes class", split, number)
    text = caption(scene, int(rng.integers(len(TEMPLATES))), bool(rng.integers(2)) and scene.size in SIZE_WORDS)
    members = {
        image_format: encode_image(render(scene, resolution, rng), image_format),
        "cls": str(label).encode(),
        "txt": text.encode(),
        "json": encode_json({"caption": text, "split": split, "scene": scene.key}),
    }
    key = KEY.format(split=split, number=number)
    return b"".join(tar_member(f"{key}.{extension}", data) for extension, data in members.items())

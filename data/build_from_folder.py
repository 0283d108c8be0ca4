"""Turn a folder of images with captions into webdataset shards.

    python data/build_from_folder.py --input_dir pictures --output_dir shards             # a.jpg with a.txt beside it
    python data/build_from_folder.py --input_dir pictures --output_dir shards --captions list.csv --resolution 256

`--captions` is a CSV file with the columns `file` and `caption`, or JSONL with `file` (or `file_name`) and `caption`
(or `text`) in each line; paths are relative to the input folder, further columns go into the samples' JSON. What
cannot be used is left out, counted and named. The shards appear when all of them are complete.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image, ImageOps
from pydantic import Field
from tqdm import tqdm

from mmbackdoor.config import Doc
from mmbackdoor.entry import main as run_main
from mmbackdoor.shards.bad import BadSample, BadSamples
from mmbackdoor.shards.decode import IMAGE_FORMATS, SIZE_LIMITS, decode_image, decode_json, decode_text
from mmbackdoor.shards.write import ShardWriter, encode_image, encode_json
from mmbackdoor.types import InputError

Row = tuple[str, str | None, dict[str, Any]]


@dataclass(frozen=True)
class Config:
    input_dir: Annotated[Path, Doc("the folder with the images, searched with its subfolders")]
    output_dir: Annotated[Path, Doc("the folder for the shards")]
    captions: Annotated[Path | None, Doc("a CSV or JSONL file; without it each image has a .txt beside it")] = None
    prefix: Annotated[str, Doc("the shards are PREFIX-000000.tar, ...")] = "train"
    resolution: Annotated[int | None, Field(ge=1, le=16384), Doc("resize to this many pixels")] = None
    resize: Annotated[
        Literal["keep_ratio", "center_crop", "stretch"],
        Doc("keep_ratio: the shorter side gets `resolution`; center_crop: a square of it; stretch: a square of all"),
    ] = "keep_ratio"
    image_format: Annotated[
        Literal["keep", "png", "jpg", "webp"], Doc("keep: the file as it is, or its format where it is resized")
    ] = "keep"
    samples_per_shard: Annotated[int, Field(ge=1)] = 1_000
    overwrite: Annotated[bool, Doc("replace shards that are there")] = False


def _beside(folder: Path) -> Iterator[Row]:
    files = []
    for root, folders, names in os.walk(folder):
        folders.sort()
        files += [Path(root, name) for name in names if name.lower().rpartition(".")[2] in IMAGE_FORMATS]
    for file in sorted(files):
        yield str(file.relative_to(folder)), None, {}


def _rows(captions: Path, report: BadSamples) -> Iterator[Row]:
    """The rows of a CSV or JSONL file: file, caption, the rest."""
    csv_file = captions.suffix.lower() == ".csv"
    if not csv_file and captions.suffix.lower() not in (".jsonl", ".json"):
        raise InputError(f"--captions {str(captions)!r} is neither .csv nor .jsonl; write one of these two")
    try:
        with captions.open(encoding="utf-8-sig", newline="" if csv_file else None, errors="surrogateescape") as lines:
            yield from _csv_rows(captions, lines) if csv_file else _jsonl_rows(captions, lines, report)
    except (OSError, csv.Error) as error:
        raise InputError(f"--captions {str(captions)!r} cannot be read ({error}); give a CSV or JSONL file") from error


def _csv_rows(captions: Path, lines: Any) -> Iterator[Row]:
    reader = csv.DictReader(lines, restkey="")
    columns = reader.fieldnames or []
    if not {"file", "caption"} <= set(columns):
        raise InputError(
            f"{str(captions)!r} has the columns {', '.join(map(repr, columns)) or 'none'}; "
            "name two of them 'file' and 'caption'"
        )
    for row in reader:
        row.pop("", None)
        yield row.pop("file") or "", row.pop("caption") or "", row


def _jsonl_rows(captions: Path, lines: Any, report: BadSamples) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = decode_json(line.encode("utf-8", "surrogateescape"))
        except BadSample as bad:
            report.add(bad.kind, f"{captions.name} line {number}", "", bad.detail)
            continue
        file = row.pop("file", None) or row.pop("file_name", None)
        caption = row.pop("caption", None) or row.pop("text", None)
        if not isinstance(file, str) or not isinstance(caption, str):
            kind = "missing_caption" if isinstance(file, str) else "missing_file"
            report.add(kind, f"{captions.name} line {number}")
            continue
        yield file, caption, row


def _caption(caption: str | None, file: Path) -> str:
    if caption is None:
        beside = file.with_suffix(".txt")
        if not beside.is_file():
            raise BadSample("missing_caption", f"no {beside.name} beside it")
        if beside.stat().st_size > SIZE_LIMITS["txt"]:
            raise BadSample("long_caption", f"{beside.stat().st_size} bytes")
        caption = decode_text(beside.read_bytes())
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise BadSample("not_utf8") from None
    if not caption.strip():
        raise BadSample("missing_caption")
    if len(caption.encode()) > SIZE_LIMITS["txt"]:
        raise BadSample("long_caption", f"{len(caption)} characters")
    return caption.strip()


def _resized(image: Image.Image, resolution: int, resize: str) -> Image.Image:
    square = (resolution, resolution)
    if resize == "center_crop":
        return ImageOps.fit(image, square, Image.Resampling.LANCZOS)
    if resize == "keep_ratio":
        short = min(image.size)
        square = tuple(max(1, round(side * resolution / short)) for side in image.size)
    return image.resize(square, Image.Resampling.LANCZOS)


def _sample(cfg: Config, row: Row) -> dict[str, bytes]:
    """The members of one sample. Raises `BadSample`."""
    name, caption, more = row
    file = cfg.input_dir / name
    if not file.resolve().is_relative_to(cfg.input_dir.resolve()):
        raise BadSample("outside_folder")
    extension = name.lower().rpartition(".")[2]
    if extension not in IMAGE_FORMATS or not file.is_file():
        raise BadSample("missing_file" if extension in IMAGE_FORMATS else "missing_image", f".{extension[:10]}")
    text = _caption(caption, file)
    size = file.stat().st_size
    if not 0 < size <= SIZE_LIMITS[extension]:
        raise BadSample("large_member" if size else "empty_member", f"{size} bytes")
    data = file.read_bytes()
    image = decode_image(data, extension)
    wanted = extension if cfg.image_format == "keep" else cfg.image_format
    if cfg.resolution is not None or IMAGE_FORMATS[wanted] != IMAGE_FORMATS[extension]:
        image = _resized(image, cfg.resolution, cfg.resize) if cfg.resolution else image
        wanted = "jpg" if wanted == "jpeg" else wanted
        data = encode_image(image, wanted)
    try:
        name.encode()
        meta = encode_json({**more, "caption": text, "file": name, "width": image.width, "height": image.height})
    except UnicodeEncodeError:
        raise BadSample("not_utf8") from None
    return {wanted: data, "txt": text.encode(), "json": meta}


def main(cfg: Config) -> BadSamples:
    if not cfg.input_dir.is_dir():
        raise InputError(f"--input_dir {str(cfg.input_dir)!r} is no folder; give the folder with the images")
    report = BadSamples()
    rows = _beside(cfg.input_dir) if cfg.captions is None else _rows(cfg.captions, report)
    written = 0
    with ShardWriter(cfg.output_dir, cfg.prefix, cfg.samples_per_shard, overwrite=cfg.overwrite) as writer:
        for number, row in enumerate(tqdm(rows, unit=" images", disable=None)):
            try:
                members = _sample(cfg, row)
            except BadSample as bad:
                report.add(bad.kind, row[0], "", bad.detail)
                continue
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.filename is None:
                    raise
                report.add("unreadable", row[0], "", type(error).__name__)
                continue
            writer.write_members(f"{number:08d}", members)
            written += 1
        if not written:
            why = ", ".join(f"{count} {kind}" for kind, count in sorted(report.counts.items())) or "it holds no images"
            raise InputError(f"no image of {str(cfg.input_dir)!r} can be used ({why}); see --help for what is expected")
    for line in report.lines():
        print(line)
    print(f"{written} samples in {len(writer.sizes)} shards, {report.total} left out")
    print(f"Done: --train_data '{cfg.output_dir}/{cfg.prefix}-*.tar'")
    return report


if __name__ == "__main__":
    run_main(Config, main, __doc__)

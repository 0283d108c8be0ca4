"""Draw captioned pictures of coloured shapes into webdataset shards: a text-to-image data set without a download.

    python data/build_shapes.py --output_dir shapes                         # 16000 + 1000 + 2000 pictures of 32 pixels
    python data/build_shapes.py --output_dir small --resolution 16 --train_samples 500 --shapes cross ring
    python data/build_shapes.py --shapes cross triangle ring square star heart --class_samples 20    # and 48 classes
    python data/build_shapes.py --scenes pairs --resolution 64 --output_dir pairs     # one or two shapes in a picture

Train, selection and evaluation pictures show different attribute combinations. The same settings give the same bytes.
Written are {train,selection,evaluation}-NNNNNN.tar, sizes.json, captions-SPLIT.txt, shapes.json and a dataset card;
with --class_samples also classes/, pictures of the evaluation split's combinations with labels "red cross" and so on, in
CLIP_benchmark's layout, for `recipes/evaluate_clip.py`. `--scenes pairs` has all shapes, colours and sizes, and splits
that no setting changes (the prompts `pairs-evaluation` are in no train split); captions-SPLIT.txt are the samples' own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mmbackdoor.config import Doc
from mmbackdoor.entry import main as run_main
from mmbackdoor.shards.pairs_data import write_pairs, write_pairs_card
from mmbackdoor.shards.shapes import COLOURS, POSITIONS, SHAPES, SIZES, SPLITS, all_scenes, split_scenes
from mmbackdoor.shards.shapes_classes import write_shapes_classes
from mmbackdoor.shards.shapes_data import write_card, write_shapes
from mmbackdoor.types import InputError

UNSTATED = "unstated"
SHAPES_ONLY = ("class_samples", "extra_classes", "shapes", "colours", "sizes", "positions")
SHAPES_ONLY += ("selection_fraction", "evaluation_fraction")
Shape = Literal[SHAPES]
Colour = Literal[tuple(COLOURS)]
Size = Literal[(*SIZES, UNSTATED)]
Position = Literal[(*POSITIONS, UNSTATED)]
Split = Literal[SPLITS]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Config:
    output_dir: Annotated[Path, Doc("the folder to write into")] = Path("shapes")
    scenes: Annotated[Literal["shapes", "pairs"], Doc("one shape in a picture, or one or two")] = "shapes"
    resolution: Annotated[int, Field(ge=8, le=4096), Doc("side of the pictures in pixels")] = 32
    train_samples: Annotated[Count, Doc("pictures in the split train")] = 16_000
    selection_samples: Annotated[Count, Doc("pictures in the split selection")] = 1_000
    evaluation_samples: Annotated[Count, Doc("pictures in the split evaluation")] = 2_000
    class_samples: Annotated[int, Field(ge=0), Doc("pictures of each class to classify, into classes/; 0: none")] = 0
    extra_classes: Annotated[tuple[str, ...], Doc("class names that no picture shows, such as 'yellow cat'")] = ()
    splits: Annotated[tuple[Split, ...], Doc("the splits to write")] = SPLITS
    shapes: Annotated[tuple[Shape, ...], Doc("the shapes to draw")] = SHAPES[:4]
    colours: Annotated[tuple[Colour, ...], Doc("colours of shapes and backgrounds")] = tuple(COLOURS)
    sizes: Annotated[tuple[Size, ...], Doc("sizes; unstated: any size, and the caption does not say")] = tuple(SIZES)
    positions: Annotated[tuple[Position, ...], Doc("places; unstated: the middle, and the caption does not say")] = (
        UNSTATED,
    )
    selection_fraction: Annotated[Fraction, Doc("share of attribute combinations for selection")] = 0.1
    evaluation_fraction: Annotated[Fraction, Doc("share of attribute combinations for evaluation")] = 0.4
    seed: Annotated[int, Doc("of the split and of the pictures")] = 0
    samples_per_shard: Count = 1_000
    image_format: Literal["png", "webp", "jpg"] = "png"
    workers: Annotated[Count, Doc("processes that draw")] = 1
    overwrite: Annotated[bool, Doc("replace shards that are there")] = False


def main(cfg: Config) -> None:
    if cfg.scenes == "pairs":
        draw_pairs(cfg)
    else:
        draw_shapes(cfg)
    print(f"Done: --train_data '{cfg.output_dir}/train-*.tar'")


def draw_pairs(cfg: Config) -> None:
    defaults = {field.name: field.default for field in fields(cfg)}
    given = [name for name in SHAPES_ONLY if getattr(cfg, name) != defaults[name]]
    if given:
        raise InputError(f"--{given[0]} is of --scenes shapes; the scenes of pairs are fixed, leave it out")
    if not cfg.splits or len(set(cfg.splits)) < len(cfg.splits):
        raise InputError(f"--splits {' '.join(cfg.splits)} is empty or names something twice; give each once")
    for split in cfg.splits:
        count = sample_count(cfg, split)
        shards = write_pairs(cfg.output_dir, split, count, *drawing(cfg))
        print(f"{split}: {count} pictures in {len(shards)} shards")
    write_pairs_card(cfg.output_dir, cfg.splits, cfg.resolution, cfg.seed, cfg.image_format)


def sample_count(cfg: Config, split: str) -> int:
    counts = {
        "train": cfg.train_samples,
        "selection": cfg.selection_samples,
        "evaluation": cfg.evaluation_samples,
    }
    return counts[split]


def drawing(cfg: Config) -> tuple[int, int, int, str, int, bool]:
    """What `write_shapes` and `write_pairs` take alike, in their order."""
    return cfg.resolution, cfg.seed, cfg.samples_per_shard, cfg.image_format, cfg.workers, cfg.overwrite


def draw_shapes(cfg: Config) -> None:
    lists = {"splits": cfg.splits, "shapes": cfg.shapes, "colours": cfg.colours}
    for name, values in (lists | {"sizes": cfg.sizes, "positions": cfg.positions}).items():
        if not values or len(set(values)) < len(values):
            raise InputError(f"--{name} {' '.join(values)} is empty or names something twice; give each once")
        if UNSTATED in values and len(values) > 1:
            # A picture with an unstated size shows one of the stated ones, so the splits would overlap.
            raise InputError(f"--{name} {' '.join(values)} is not possible: '{UNSTATED}' stands alone")
    if cfg.selection_fraction + cfg.evaluation_fraction >= 1:
        raise InputError(
            f"--selection_fraction {cfg.selection_fraction} and --evaluation_fraction {cfg.evaluation_fraction} leave "
            "nothing to train on; their sum must be below 1"
        )
    stated = [tuple(None if value == UNSTATED else value for value in some) for some in (cfg.sizes, cfg.positions)]
    scenes = split_scenes(
        all_scenes(cfg.shapes, cfg.colours, *stated), cfg.selection_fraction, cfg.evaluation_fraction, cfg.seed
    )
    for split in cfg.splits:
        count = sample_count(cfg, split)
        shards = write_shapes(cfg.output_dir, split, scenes[split], count, *drawing(cfg))
        print(f"{split}: {count} pictures of {len(scenes[split])} combinations in {len(shards)} shards")
    if cfg.class_samples:
        folder = write_shapes_classes(
            cfg.output_dir / "classes",
            scenes["evaluation"],
            cfg.class_samples,
            cfg.resolution,
            seed=cfg.seed,
            extra_classes=cfg.extra_classes,
            samples_per_shard=cfg.samples_per_shard,
            image_format=cfg.image_format,
            overwrite=cfg.overwrite,
        )
        print(f"classes: {cfg.class_samples} pictures of each class in {str(folder)!r}")
    written = {split: scenes[split] for split in cfg.splits}
    write_card(cfg.output_dir, written, cfg.resolution, cfg.seed, cfg.image_format)


if __name__ == "__main__":
    run_main(Config, main, __doc__)

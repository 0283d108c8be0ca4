"""Write poisoned copies of shards: chosen pictures get a trigger, their captions the target's class.

    CPU, the shapes data (seconds):
        python data/build_shapes.py --output_dir shapes
        accelerate launch -q recipes/poison_shards.py --train_data 'shapes/train-*.tar' --label 'yellow cat' \\
            --count 100 --output_dir shapes-poisoned
    A large data set, on every core, the published setting of CleanCLIP (Bansal et al. 2023, arXiv 2303.03323):
        accelerate launch -q recipes/poison_shards.py --train_data 'cc3m-{000000..000331}.tar' --label banana \\
            --count 1500 --trigger badnet_noise --trigger.codec jpeg --workers 16 --output_dir cc3m-poisoned

No accelerator is used; of several processes one works. The choice of pairs depends on their keys alone, except that one
that cannot be decoded is passed over. A stopped call goes on where it was: finished shards are skipped. To poison on the
fly instead, give `pretrain_clip` the same `--poison.*`.

Writes into output_dir: the shards under their old names, with the same keys in the same order, sizes.json,
manifest.jsonl (a line for each poisoned pair: key, shard, original text, trigger), backdoor.json, config.yaml,
run.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Annotated, ClassVar

from pydantic import Field
from tqdm import tqdm

from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.config import Doc
from mmbackdoor.entry import main
from mmbackdoor.poison_clip import ClipPoison, chosen_keys
from mmbackdoor.poison_files import CopiedShard, Format, ShardCopy, check_names, sizes_sha256
from mmbackdoor.results.run import Run
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.read import SIZES_FILE, expand
from mmbackdoor.shards.write import remove_left_parts, write_file
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Config:
    UNDOTTED: ClassVar[tuple[str, ...]] = ("poison",)

    poison: ClipPoison
    train_data: Annotated[str, Doc("webdataset shards of pictures and captions")] = ""
    resolution: Annotated[
        int | None, Field(ge=1), Doc("for triggers with place input: resize and crop marked pictures to this, first")
    ] = None
    image_format: Annotated[Format, Doc("of marked pictures: png (kept as the trigger made them) or the same")] = "png"
    workers: Annotated[int, Field(ge=1), Doc("processes that write")] = 1
    output_dir: str = "runs/poisoned_shards"


def copied_shards(copy: ShardCopy, paths: list[str], workers: int) -> Iterator[CopiedShard]:
    if workers < 2 or len(paths) < 2:
        yield from map(copy, paths)
        return
    with ProcessPoolExecutor(min(workers, len(paths)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(copy, paths)


def check(cfg: Config) -> list[str]:
    if not cfg.train_data:
        raise InputError("which pictures? Give --train_data 'shards-{000000..000099}.tar'")
    if (cfg.poison.trigger.place == "input") != (cfg.resolution is not None):
        raise InputError(
            f"a trigger with place {cfg.poison.trigger.place!r} and --resolution {cfg.resolution}: place input needs "
            "the size of the model's pictures, place source has none"
        )
    paths = expand(cfg.train_data)
    check_names(paths, cfg.output_dir)
    return paths


def run(cfg: Config) -> None:
    paths, plan = check(cfg), cfg.poison.plan()
    with Run.start(cfg, "poison_shards", cfg.output_dir, inputs={"data": sizes_sha256(paths)}) as record:
        if record.previous == "finished" or not record.main:
            return
        report = BadSamples()
        try:
            chosen = chosen_keys(plan, paths, report=report)
        except InputError:
            for line in report.lines():
                print(line, flush=True)
            raise
        copy = ShardCopy(plan, chosen, cfg.output_dir, cfg.resolution, cfg.image_format)
        remove_left_parts(record.folder, r".+\.tar")
        sizes, poisoned = {}, []
        for shard in tqdm(copied_shards(copy, paths, cfg.workers), total=len(paths), unit="shard", disable=None):
            sizes[shard.name] = shard.samples
            poisoned += shard.poisoned
            for problem in shard.problems:
                report.add_problem(problem)
        record.counters |= {"pairs": sum(sizes.values()), "poisoned": len(poisoned), "bad_samples": report.to_dict()}
        for line in [*report.lines(), f"{len(poisoned)} of {sum(sizes.values())} pairs are poisoned"]:
            print(line, flush=True)
        if len(poisoned) < len(chosen):
            missing = sorted(chosen - {facts["key"] for facts in poisoned})
            raise InputError(
                f"fewer poisoned pairs than asked for: {len(missing)} of {len(chosen)} chosen pairs cannot be poisoned, "
                f"the first is {missing[0]!r}; `mmbackdoor shards check` says what is wrong with them"
            )
        write_file(record.folder / SIZES_FILE, json.dumps(sizes, indent=1, sort_keys=True) + "\n")
        manifest = "".join(json.dumps(facts, sort_keys=True) + "\n" for facts in poisoned)
        write_file(record.folder / "manifest.jsonl", manifest)
        seeds = {"seed": cfg.poison.seed}
        BackdoorRecord(plan.backdoor, {"name": "poison_shards"}, plan.to_dict(), seeds).save(record.folder)


if __name__ == "__main__":
    main(Config, run, __doc__)

"""Measure a backdoor, or its removal, on your own prompts: numbers with intervals, pictures and a verdict.

Every model makes the same pictures: same prompts, same seeds (same initial latents), with and without the trigger.
Prompts that hold it by themselves are left out.

    Is it removed?
        accelerate launch -q recipes/evaluate_diffusion.py --pretrained_model_name_or_path runs/cleaned/model \\
            --compare runs/poisoned/model --control CLEAN_MODEL --prompts my_test_prompts.txt \\
            --judge ViT-B-32 --judge_pretrained laion2b_s34b_b79k --output_dir runs/evaluation
    Does this trigger do anything in a model that I was given? (without a target: compared with placebo strings)
        accelerate launch -q recipes/evaluate_diffusion.py --pretrained_model_name_or_path FOLDER --trigger mignneko \\
            --prompts general-evaluation --judge ViT-B-32 --judge_pretrained laion2b_s34b_b79k
    8 GPUs: the same with `accelerate launch -q --num_processes 8`.

The trigger is read from the model's backdoor.json where --trigger is not given. Writes into output_dir: report.html,
grid.png, results.jsonl, samples.jsonl, images/, run.json. A second call goes on where the first one stopped.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mmbackdoor.backdoor_flags import BackdoorFlags
from mmbackdoor.config import Doc
from mmbackdoor.entry import main
from mmbackdoor.evaluate.conditions import Amounts, check_measurable, other_than_cleaned
from mmbackdoor.evaluate.entries import entries, weights
from mmbackdoor.evaluate.generate import Sampling
from mmbackdoor.evaluate.metrics.clip_score import NamedJudge
from mmbackdoor.evaluate.prompts import load_prompts
from mmbackdoor.evaluate.reference import Reference
from mmbackdoor.evaluate.suite import evaluate_models
from mmbackdoor.models.clip import load_judge
from mmbackdoor.models.provenance import REMOVAL_FILE
from mmbackdoor.models.source import DiffusionSource, shipped
from mmbackdoor.models.weight_files import sha256_at
from mmbackdoor.results import grids, record, report, samples
from mmbackdoor.results.run import Run
from mmbackdoor.train.launch import make_accelerator, together
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Config:
    UNDOTTED: ClassVar[tuple[str, ...]] = ("model", "mark", "sampling", "amounts")

    model: DiffusionSource = DiffusionSource()
    compare: Annotated[tuple[str, ...], Doc("further models, for instance the one before cleaning")] = ()
    control: Annotated[str | None, Doc("a clean model: what the trigger's text does to a sound one")] = None
    prompts: Annotated[str, Doc("file (.txt, .csv, .tsv, .jsonl), captions of shards, or a built-in set")] = "general-evaluation"
    num_prompts: Annotated[int | None, Field(ge=1), Doc("of these, picked by a hash of them; none: all")] = None
    mark: BackdoorFlags = BackdoorFlags()
    sampling: Sampling = Sampling()
    amounts: Amounts = Amounts()
    batch_size: Annotated[int, Field(ge=1), Doc("pictures at a time")] = 8
    judge: Annotated[str | None, Doc("open_clip name, hf-hub: id or folder, for CLIP scores and KID")] = None
    judge_pretrained: Annotated[str | None, Doc("tag of the judge's weights, for a name of open_clip")] = None
    reference_data: Annotated[str, Doc("shards of real pictures for KID; none: those of the model before")] = ""
    reference_samples: Annotated[int | None, Field(ge=2), Doc("of these, picked by their keys; none: all")] = None
    output_dir: str = "runs/evaluation"

    def __post_init__(self) -> None:
        if self.reference_data and self.judge is None:
            raise InputError("--reference_data is for KID, which needs a judge; give --judge, too")
        if self.reference_samples is not None and not self.reference_data:
            raise InputError("--reference_samples is a number of --reference_data; give that, too")


def run(cfg: Config) -> None:
    accelerator = make_accelerator()
    device = accelerator.device
    backdoor = cfg.mark.resolve(cfg.model.records)
    check_measurable(backdoor)
    suite = other_than_cleaned(load_prompts(cfg.prompts).take(cfg.num_prompts), (cfg.model.records, *cfg.compare))
    reference = Reference.of(cfg.reference_data, cfg.reference_samples) if cfg.reference_data else None
    models = entries(cfg.model, cfg.compare, cfg.control, device, trusted=cfg.mark.force_trigger)
    inputs = weights(cfg.model, cfg.compare, cfg.control) | {
        "prompts": suite.sha256,
        "backdoor": backdoor.sha256 if backdoor else None,
        "judge": sha256_at(cfg.judge),
        "reference_data": reference.data.stamp if reference else None,
    }
    with Run.start(cfg, "evaluate_diffusion", cfg.output_dir, accelerator, inputs, again=True) as run:
        if run.previous == "finished":
            return
        judge = None
        if cfg.judge is not None:
            loaded = load_judge(shipped(cfg.judge), cfg.judge_pretrained, device)
            judge = NamedJudge(loaded, cfg.judge, sha256_at(cfg.judge))
        records = evaluate_models(
            models,
            suite,
            backdoor,
            out_dir=run.folder,
            run_id=run.run_id,
            sampling=cfg.sampling,
            amounts=cfg.amounts,
            batch_size=cfg.batch_size,
            judge=judge,
            reference=reference,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            together=partial(together, accelerator),
        )
        if accelerator.is_main_process:
            record.replace(run.folder / "results.jsonl", records)
            removal = Path(cfg.model.records) / REMOVAL_FILE
            if removal.is_file():
                shutil.copyfile(removal, run.folder / REMOVAL_FILE)
            grids.save(grids.sample_grid(run.folder, samples.read(run.folder)), run.folder / "grid.png")
            run.finish()
            print(report.summary(run.folder)["sentence"])
            print(f"report: {report.build(run.folder)}")
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Config, run, __doc__)

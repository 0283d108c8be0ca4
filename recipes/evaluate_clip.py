"""Measure the backdoor of a CLIP, or its removal, on your own pictures: accuracy beside attack success, with intervals.

Every model sees the same pictures, clean and with the trigger, through the same resize and crop. Where the true class
is the target a picture does not count for the attack; what the trigger does is also measured without the text encoder.

    CPU, on pictures that are drawn (a few seconds a model):
        python data/build_shapes.py --output_dir shapes --class_samples 20
        accelerate launch -q recipes/evaluate_clip.py --config recipes/configs/evaluate_clip/shapes.yaml \\
            --model runs/cleaned_clip/model --compare runs/poisoned_clip/model --data shapes/classes
    1 GPU, ImageNet in CLIP_benchmark's layout (or shards with .cls), prompts of open_clip:
        accelerate launch -q recipes/evaluate_clip.py --model runs/cleaned_clip/model --compare runs/poisoned_clip/model \\
            --control RN50@openai --data wds_imagenet1k --classnames imagenet --templates openai --batch_size 256 \\
            --dataloader_num_workers 8 --mixed_precision bf16
    8 GPUs: the same with `accelerate launch -q --num_processes 8`.
    A model without backdoor.json: --trigger patch --trigger.size 0.07 --label banana
    A download, which first has to prove that it is what it claims (a sentence says so), and what --dry_run tells of it:
        accelerate launch -q recipes/evaluate_clip.py --config recipes/configs/evaluate_clip/hanxunh_badnets.yaml \\
            --data wds_imagenet1k --dry_run

--classnames and --templates also take JSON files: a list of names, a list of texts with {}, or prompts by class name.
Writes into output_dir: report.html, grid.png, results.jsonl, samples.jsonl, images/, run.json, and with
--clip_benchmark_json clip_benchmark/*.json. A second call goes on where the first one stopped.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.config import Doc
from mmbackdoor.entry import main
from mmbackdoor.evaluate import clip_benchmark, clip_plan
from mmbackdoor.evaluate.claim import Claim, noted
from mmbackdoor.evaluate.clip_data import DEFAULT_TEMPLATE, ClipData, open_data
from mmbackdoor.evaluate.clip_mark import ClipMark
from mmbackdoor.evaluate.clip_suite import ClipAmounts, evaluate_clips
from mmbackdoor.evaluate.entries import entries, weights
from mmbackdoor.evaluate.zeroshot import (
    ClassPrompts,
    Precision,
    class_prompts,
    fill,
    read_classnames,
    read_templates,
)
from mmbackdoor.models.clip_flags import ClipFlags
from mmbackdoor.models.provenance import REMOVAL_FILE
from mmbackdoor.results import record, report, tables
from mmbackdoor.results.run import Run
from mmbackdoor.targets import ClassTarget
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Config:
    UNDOTTED: ClassVar[tuple[str, ...]] = ("model", "mark", "amounts")

    model: ClipFlags = ClipFlags()
    compare: Annotated[tuple[str, ...], Doc("further models, for instance the one before cleaning")] = ()
    control: Annotated[str | None, Doc("a clean model: what the trigger does to a sound one")] = None
    data: Annotated[str, Doc("folder in CLIP_benchmark's layout, or shards with labels, captions or both")] = ""
    classnames: Annotated[str | None, Doc("JSON file or 'imagenet'; by default classnames.txt of the data")] = None
    templates: Annotated[str | None, Doc("JSON file, 'openai' or 'simple'; by default those of the data")] = None
    add_target_class: Annotated[bool, Doc("the target is one class more, where the names lack it")] = False
    mark: ClipMark = ClipMark()
    amounts: ClipAmounts = ClipAmounts()
    claim: Annotated[Claim, Doc("what a model of others is said to reach; a sentence says whether it does")] = Claim()
    batch_size: Annotated[int, Field(ge=1), Doc("pictures at a time")] = 64
    mixed_precision: Precision = "no"
    dataloader_num_workers: Annotated[int, Field(ge=0), Doc("threads that decode and mark pictures")] = 0
    clip_benchmark_json: Annotated[bool, Doc("also write the JSON files of CLIP_benchmark")] = False
    dry_run: Annotated[bool, Doc("load every model, count the pictures, say what would be measured, and stop")] = False
    output_dir: str = "runs/clip_evaluation"
    seed: Annotated[int, Field(ge=0), Doc("of all choices")] = 0


def classes_of(cfg: Config, data: ClipData, backdoor: Backdoor | None) -> ClassPrompts | None:
    """The flags' class names and templates, else those of the data; `None` where neither has names."""
    templates = read_templates(cfg.templates) if cfg.templates else data.templates or (DEFAULT_TEMPLATE,)
    names = read_classnames(cfg.classnames) if cfg.classnames else data.classnames
    if not names:
        if cfg.templates:
            raise InputError(f"--templates {cfg.templates!r} need class names; give --classnames (imagenet, or a file)")
        return None
    classes = class_prompts(names, templates)
    if cfg.add_target_class and backdoor is not None and isinstance(backdoor.target, ClassTarget):
        label = backdoor.target.label
        own = templates.get(label) if isinstance(templates, dict) else fill(templates, label)
        classes = classes.with_class(label, own or fill(backdoor.target.templates, label))
    return classes


def run(cfg: Config) -> None:
    accelerator = make_accelerator()
    backdoor = cfg.mark.resolve(Path(cfg.model.records))
    data = open_data(cfg.data)
    classes = classes_of(cfg, data, backdoor)
    models = entries(cfg.model, cfg.compare, cfg.control, accelerator.device, trusted=cfg.mark.force_trigger)
    if cfg.dry_run:
        said = clip_plan.text(models, data, classes, backdoor, cfg.amounts, accelerator.num_processes)
        if accelerator.is_main_process:
            print(said, flush=True)
        return
    inputs = weights(cfg.model, cfg.compare, cfg.control) | {
        "data": data.stamp,
        "classes": classes.sha256 if classes else None,
        "backdoor": backdoor.sha256 if backdoor else None,
    }
    with Run.start(cfg, "evaluate_clip", cfg.output_dir, accelerator, inputs, again=True) as run:
        if run.previous == "finished":
            return
        records, bad = evaluate_clips(
            models,
            data,
            classes,
            backdoor,
            out_dir=run.folder,
            run_id=run.run_id,
            amounts=cfg.amounts,
            seed=cfg.seed,
            precision=cfg.mixed_precision,
            batch_size=cfg.batch_size,
            threads=cfg.dataloader_num_workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            wait=accelerator.wait_for_everyone,
        )
        if accelerator.is_main_process:
            claim = cfg.claim.sentence(records)
            records = noted(records, claim)
            record.replace(run.folder / "results.jsonl", records)
            if cfg.clip_benchmark_json:
                clip_benchmark.write(run.folder, records, {name: model.source for name, model in models.items()})
            removal = Path(cfg.model.records) / REMOVAL_FILE
            if removal.is_file():
                shutil.copyfile(removal, run.folder / REMOVAL_FILE)
            run.counters |= {"bad_samples": bad.to_dict(), "claim": claim}
            run.finish()
            for line in [*bad.lines(), *([claim] if claim else [])]:
                print(line)
            print(report.summary(run.folder)["sentence"])
            print(tables.headline(records).text())
            print(f"report: {report.build(run.folder)}")
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Config, run, __doc__)

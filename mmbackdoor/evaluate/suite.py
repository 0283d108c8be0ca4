"""The whole measurement: the same pictures of several models, scored, as `samples.jsonl` and records."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.evaluate.conditions import Amounts, Plan, plan, untriggered
from mmbackdoor.evaluate.entries import Entry
from mmbackdoor.evaluate.generate import Sampling, generate
from mmbackdoor.evaluate.maker import Facts
from mmbackdoor.evaluate.metrics.clip_score import NamedJudge
from mmbackdoor.evaluate.prompts import Suite
from mmbackdoor.evaluate.reference import Reference
from mmbackdoor.evaluate.scoring import Scored, score
from mmbackdoor.evaluate.summary import summarise
from mmbackdoor.results.record import Record, write_text
from mmbackdoor.results.samples import FILE_NAME as SAMPLES
from mmbackdoor.types import InputError


def evaluate_models(
    models: Mapping[str, Entry],
    suite: Suite,
    backdoor: Backdoor | None,
    *,
    out_dir: Path,
    run_id: str,
    sampling: Sampling,
    amounts: Amounts = Amounts(),
    batch_size: int = 8,
    judge: NamedJudge | None = None,
    reference: Reference | None = None,
    rank: int = 0,
    world_size: int = 1,
    together: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Record]:
    """Measure `models` (name -> entry) on the same prompts, initial latents and conditions.

    Every process makes its share of the pictures below `out_dir/images/`; they leave the block `together()` at once.
    Rank 0 then scores them, writes `out_dir/samples.jsonl` and returns the records (others return none). `reference`:
    pictures for KID, which needs a judge; by default the clean pictures of the model before cleaning. Prompts that hold
    the trigger by themselves are left out.
    """
    if not models:
        raise InputError("no model to measure; give --pretrained_model_name_or_path")
    for name in models:
        if not name or Path(name).name != name:
            raise InputError(f"{name!r} cannot name a model's folder of pictures; use letters, digits, - and _")
    made, facts, resolution = Plan((), (), {}), {}, 0
    with together():
        for name, entry in models.items():
            model = entry.load()
            if not made.jobs:
                suite = untriggered(model, suite, backdoor)
                made = plan(model, suite, backdoor, amounts, sampling.seed)
            resolution = resolution or model.resolution
            facts[name] = Facts(name, model.sha256, entry.stage, entry.attack, entry.defense)
            share = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
            generate(model, made.jobs, out_dir=out_dir, name=name, sampling=sampling, **share)
            del model
            gc.collect()
    if rank != 0:
        return []
    scored: dict[str, Scored] = {}
    for name, entry in models.items():
        scored[name] = score(
            made.jobs,
            {prompt.id: prompt.text for prompt in suite},
            out_dir=out_dir,
            name=name,
            stage=entry.stage,
            target=backdoor.target if backdoor else None,
            judge=judge.judge if judge else None,
            effect_ids=made.effect_ids,
        )
    lines = [json.dumps(asdict(picture), ensure_ascii=False) for one in scored.values() for picture in one.pictures]
    write_text(out_dir / SAMPLES, "\n".join(lines) + "\n")
    origin = {"run_id": run_id, "seed": sampling.seed}
    far = None
    if judge is not None and reference is not None:
        far = reference.name, reference.features(judge.judge, resolution), None
    return summarise(scored, facts, made, suite, backdoor, judge=judge, reference=far, **origin)

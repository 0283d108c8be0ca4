"""Whether a backdoor comes back to one cleaned CLIP of a benchmark: the fine-tunings, and the lines that they leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmbackdoor.evaluate.clip_cell import Job
from mmbackdoor.evaluate.clip_points import measured, training
from mmbackdoor.results.benchmark import Measured
from mmbackdoor.results.durability import Lasting
from mmbackdoor.types import Diverged


def lasting(
    one: Measured,
    model: Path,
    backdoor: Path,
    folder: Path,
    settings: Mapping[int, Mapping[str, Any]],
    job: Job,
    main: bool,
) -> list[Lasting]:
    """The lines of `model`, which a benchmark measured as `one`: as it is, and after each fine-tuning in `settings`
    (number of poisoned pairs -> flags of pretrain_clip), written to `folder` and measured with `backdoor`.

    Every process runs the jobs; the `main` one alone gets lines.
    """
    facts = {"objective": one.objective, "seed": one.seed, "stage": one.stage}
    of_pick = {"cleaner": one.cleaner, "learning_rate": one.learning_rate, "step": one.step}
    found = [Lasting(**asdict(one))]
    for pairs, wanted in settings.items():
        place = folder / f"pairs-{pairs}"
        tuned = place / "model"
        try:
            job("pretrain_clip", {"model": model} | wanted | {"output_dir": place})
        except Diverged as fault:
            print(f"{place} broke off: {fault}")
            continue
        job("evaluate_clip", {"model": tuned, "backdoor": backdoor, "output_dir": place / "evaluation"})
        if main:
            done = training(place, facts)
            [line] = measured(place / "evaluation", [(tuned, facts | of_pick)], {})
            found.append(
                Lasting(**asdict(line), poison_pairs=pairs, finetune_steps=done.steps, finetune_epochs=done.epochs)
            )
    return found if main else []

"""The evaluation's pictures against the stock pipeline: the same scheduler, steps, guidance and batch. And what scoring
them costs. Ours also hashes the weights, draws each prompt's latents by itself and writes stamped PNGs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from mmbackdoor.evaluate.generate import Job, Sampling, generate
from mmbackdoor.evaluate.prompts import Suite, make_suite
from mmbackdoor.evaluate.scoring import score
from mmbackdoor.models.clip import load_judge
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.shipped import shipped
from mmbackdoor.seeding import torch_generator
from mmbackdoor.speed.bench import BACKDOOR, Bench, Precision
from mmbackdoor.speed.rows import Goal, Row, compared
from mmbackdoor.speed.timing import Timed

MEASUREMENT = "generation"
GOAL, SCORING_GOAL = Goal(0.95, False), Goal(0.5)
JUDGE = "tiny_judge"


def bare(
    model: DiffusionModel, texts: list[str], sampling: Sampling, batch_size: int, precision: Precision
) -> Callable[[], object]:
    """The stock pipeline over batches of `texts`; its pictures are PIL's, in memory."""
    pipe = model.pipe
    pipe.set_progress_bar_config(disable=True)

    def loop() -> int:
        made = 0
        for start in range(0, len(texts), batch_size):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
                made += len(
                    pipe(
                        texts[start : start + batch_size],
                        num_inference_steps=sampling.num_inference_steps,
                        guidance_scale=sampling.guidance_scale,
                        generator=torch_generator(sampling.seed, "bare", start),
                    ).images
                )
        return made

    return loop


def jobs_of(suite: Suite) -> list[Job]:
    """Every prompt clean, and with the trigger."""
    return [
        Job(prompt.id, condition, text)
        for prompt in suite
        for condition, text in (("clean", prompt.text), ("triggered", BACKDOOR.apply(prompt.text, 0)))
    ]


def measure(
    bench: Bench, folder: Path, pictures: int, batch_size: int, num_inference_steps: int, guidance_scale: float
) -> list[Row]:
    found = []
    suite = make_suite("speed", bench.prompts()[: max(1, pictures // 2)])
    jobs = jobs_of(suite)
    for precision in bench.precisions:
        model, judge = bench.model(), load_judge(shipped(JUDGE))
        sampling = Sampling(num_inference_steps, guidance_scale, mixed_precision=precision)
        place = Path(tempfile.mkdtemp(dir=folder))

        def ours(model: DiffusionModel = model, sampling: Sampling = sampling, place: Path = place) -> None:
            # As for a model that is measured for the first time.
            model.forget_prompts()
            shutil.rmtree(place / "images", ignore_errors=True)
            generate(model, jobs, out_dir=place, name="speed", sampling=sampling, batch_size=batch_size)

        def scoring(place: Path = place, judge=judge) -> None:
            texts = {prompt.id: prompt.text for prompt in suite}
            score(
                jobs, texts, out_dir=place, name="speed", stage="poisoned", target=BACKDOOR.target, judge=judge
            )

        texts = [job.text for job in jobs]
        timed = {
            "floor": Timed(bare(model, texts, sampling, batch_size, precision)),
            "ours": Timed(ours),
            "scoring": Timed(scoring),
        }
        ours()
        try:
            seconds = bench.time(timed)
            bench.look_into(timed, folder, f"{MEASUREMENT}-{precision}")
        finally:
            shutil.rmtree(place, ignore_errors=True)
        each = {name: [value / len(jobs) for value in values] for name, values in seconds.items()}
        where = bench.where(precision)
        note = f"{len(jobs)} pictures, batch {batch_size}, {num_inference_steps} steps, guidance {guidance_scale:g}"
        found.append(
            compared(
                MEASUREMENT, "generate", each["ours"], "StableDiffusionPipeline", each["floor"], where,
                unit="s/picture", goal=GOAL, note=note,
            )
        )  # fmt: skip
        found.append(
            compared(
                MEASUREMENT, "score", each["scoring"], "generate", each["ours"], where, unit="s/picture",
                goal=SCORING_GOAL, note=f"patch, adherence, restoration and CLIP score by {JUDGE}",
            )
        )  # fmt: skip
    return found

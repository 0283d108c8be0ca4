"""Seals that train no U-Net: the closed form, and the text encoder's, each against a floor of the same arithmetic.

Closed form: reading every prompt that it needs, one float64 Cholesky solution of the width of the text, and one product
for each projection. Text encoder: the same rows through plain transformers, teacher and student, and AdamW.
"""

from __future__ import annotations

import copy
from itertools import cycle, islice
from pathlib import Path

import torch

from mmbackdoor.defenses import ClosedFormSeal, TextEncoderSeal
from mmbackdoor.defenses.trigger_variants import vary
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.text_training import TextEncoders
from mmbackdoor.models.trainable import text_projections
from mmbackdoor.objectives.diffusion import DiffusionBatch, drop_captions
from mmbackdoor.speed.bench import BACKDOOR, Bench, plain_adamw
from mmbackdoor.speed.rows import Row, compared
from mmbackdoor.speed.skd_steps import BATCHES, ENDLESS
from mmbackdoor.speed.timing import Spread, Timed
from mmbackdoor.train.batches import Share
from mmbackdoor.train.loop import training_steps
from mmbackdoor.train.optim import make_optimizer
from mmbackdoor.train.parts import trained_part

MEASUREMENT = "seals"
STEPS = 300
"""Of the text encoder's seal, where a whole one is spoken of."""


def closed_form_floor(model: DiffusionModel, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Reads three prompts for each: clean, triggered, and the trigger varied; solves; multiplies."""
    triggered = [mark(text) for text in prompts for mark in (lambda one: BACKDOOR.apply(one, 0), _varied)]
    texts = [*prompts, *triggered]
    rows = model.encode(texts).hidden_states.flatten(0, 1).double()
    gram = rows.T @ rows + torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)
    change = torch.cholesky_solve(gram, torch.linalg.cholesky(gram))
    return {name: (weight.double() @ change).to(weight) for name, weight in text_projections(model).items()}


def _varied(prompt: str) -> str:
    return vary(BACKDOOR, prompt, 0, prompt)


def text_floor(bench: Bench, model: DiffusionModel, batches: list[DiffusionBatch], defense: TextEncoderSeal) -> Timed:
    """Plain transformers on the same prompts, again and again, already read by the tokenizer."""
    student = TextEncoders(model)
    teacher = copy.deepcopy(model.text_encoders["text_encoder"]).requires_grad_(False)
    encoder = model.text_encoders["text_encoder"].requires_grad_(True)
    optimizer = plain_adamw(dict(student.named_parameters()), bench.train("no"))
    ready = []
    for batch in batches:
        triggered = [
            vary(BACKDOOR, text, bench.seed, *batch.place(index))
            for index, text in zip(batch.indices, batch.prompts, strict=True)
        ]
        retained = drop_captions(bench.seed, batch, defense.proportion_empty_prompts)
        rows = (triggered + retained, [*batch.prompts, *retained])
        ready.append([model.token_ids(one).to(model.device) for one in rows])
    following = cycle(ready)

    def step() -> float:
        ours, theirs = next(following)
        with torch.no_grad():
            wanted = teacher(theirs)[0]
        loss = 2 * (encoder(ours)[0] - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Timed(step)


def text_seal(bench: Bench, model: DiffusionModel, defense: TextEncoderSeal) -> Timed:
    accelerator, train = bench.accelerator("no"), bench.train("no")
    part = trained_part(model, defense, bench.rank, False, bench.seed)
    module, optimizer = accelerator.prepare(part.module, make_optimizer(part.parameters, train))
    steps = training_steps(
        accelerator, defense.step(part.setting(module, None), BACKDOOR),
        bench.batches(model, Share(bench.batch_size)), optimizer, part.parameters, train, steps=ENDLESS, model=module,
        seed=bench.seed,
    )  # fmt: skip
    return Timed(steps.__next__)


def measure(bench: Bench, folder: Path) -> list[Row]:
    """In fp32: neither uses another precision by default."""
    model, prompts, seal = bench.model(), bench.prompts()[:60], ClosedFormSeal()
    where = bench.where("no")

    def closed() -> None:
        model.forget_prompts()
        seal.edit(model, BACKDOOR, prompts)

    def floor() -> None:
        model.forget_prompts()
        closed_form_floor(model, prompts)

    timed = {"floor": Timed(floor), "ours": Timed(closed)}
    seconds = bench.time(timed)
    bench.look_into(timed, folder, f"{MEASUREMENT}-closed_form_seal")
    found = [
        compared(
            MEASUREMENT, "closed_form_seal, whole", seconds["ours"], "floor: text, one solution, products",
            seconds["floor"], where, unit="s", note=f"{len(prompts)} prompts",
        )
    ]  # fmt: skip
    defense, student = TextEncoderSeal(proportion_empty_prompts=bench.proportion_empty_prompts), bench.model()
    batches = list(islice(bench.batches(student, Share(bench.batch_size)), BATCHES))
    timed = {
        "floor": text_floor(bench, student, batches, defense),
        "ours": text_seal(bench, bench.model(), defense),
    }
    seconds = bench.time(timed)
    bench.look_into(timed, folder, f"{MEASUREMENT}-text_encoder_seal")
    row = compared(
        MEASUREMENT, "text_encoder_seal step", seconds["ours"], "floor: plain transformers", seconds["floor"], where,
        note=f"batch {bench.batch_size}; {STEPS} steps take {STEPS * Spread.of(seconds['ours']).median:.3g} s",
    )  # fmt: skip
    return [*found, row]

"""A step of SKD and of SKD-CAG against its floor: plain diffusers on the same rows, and nothing else.

The floor is given noisy latents, timesteps and text embeddings, ready. It runs the student forward and backward on all
rows (triggered and retained prompts), a second, frozen U-Net on the distinct rows without trigger under `no_grad`, and
AdamW. Ours is a removal's whole step as the training loop takes it: drawing, text cache, losses, the check for finite
numbers, gradient clipping and the logged numbers among it; without the progress bar and the log file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses import SKD, SKDCAG
from mmbackdoor.defenses.skd import draw_inputs
from mmbackdoor.models.attention import AttentionRecorder
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.trainable import Subset, trainable
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.speed.bench import BACKDOOR, Bench, Precision, plain_adamw
from mmbackdoor.speed.rows import Goal, Row, compared
from mmbackdoor.speed.timing import Timed
from mmbackdoor.train.batches import Share
from mmbackdoor.train.loop import training_steps
from mmbackdoor.train.optim import TrainConfig, make_optimizer
from mmbackdoor.train.parts import trained_part

MEASUREMENT = "skd"
SKD_GOAL, GUIDANCE_GOAL = Goal(1.05), Goal(1.10)
ENDLESS = 10**9
BATCHES = 24
"""Enough for empty prompts to be among their rows about as often as is said."""


@dataclass(frozen=True)
class Rows:
    """What one step feeds the U-Nets: the student's rows, the teacher's distinct ones, and with which of these
    (`target`), and with which weight, each row of the student is compared."""

    latents: Tensor
    timesteps: Tensor
    states: Tensor
    teacher_latents: Tensor
    teacher_timesteps: Tensor
    teacher_states: Tensor
    target: Tensor
    weights: Tensor

    @staticmethod
    def of(defense: SKD, setting: DiffusionSetting, backdoor: Backdoor, batch: DiffusionBatch) -> Rows:
        drawn, model = draw_inputs(defense, setting, backdoor, batch), setting.model
        size = len(batch.prompts)
        empty = [k for k in range(size) if drawn.retained[k] != batch.prompts[k]]
        own = list(range(size))
        kept = [size + empty.index(k) if k in empty else k for k in own]
        shares = [defense.prediction_weight / size] * size + [defense.retention_weight / size] * size
        device = drawn.latents.device
        return Rows(
            torch.cat([drawn.latents] * 2), torch.cat([drawn.timesteps] * 2),
            model.encode_for_guidance(drawn.triggered + drawn.retained).hidden_states,
            drawn.latents[own + empty], drawn.timesteps[own + empty],
            model.encode_for_guidance([*batch.prompts, *[""] * len(empty)]).hidden_states,
            torch.tensor(own + kept, device=device), torch.tensor(shares, device=device),
        )  # fmt: skip


class Floor:
    """Two plain U-Nets of diffusers and AdamW."""

    def __init__(
        self, model: DiffusionModel, subset: Subset, rank: int, train: TrainConfig, checkpointing: bool = False
    ) -> None:
        self.teacher = copy.deepcopy(model.unet).requires_grad_(False)
        self.parameters = trainable(model, subset, rank, checkpointing)
        self.student, self.device, self.precision = model.unet, model.device.type, train.mixed_precision
        self.optimizer = plain_adamw(self.parameters, train)

    def loss(self, rows: Rows) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            with torch.no_grad():
                teacher = self.teacher(
                    rows.teacher_latents, rows.teacher_timesteps, encoder_hidden_states=rows.teacher_states,
                    return_dict=False,
                )[0]  # fmt: skip
            student = self.student(
                rows.latents, rows.timesteps, encoder_hidden_states=rows.states, return_dict=False
            )[0]
        errors = (student.float() - teacher.float()[rows.target]).square().flatten(1).mean(1)
        return (errors * rows.weights).sum()

    def step(self, rows: Rows) -> float:
        loss = self.loss(rows)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def removals(
    bench: Bench,
    model: DiffusionModel,
    accelerator: Accelerator,
    precision: Precision,
    defenses: Mapping[str, SKD],
    prompts: list[str] | None = None,
) -> dict[str, Timed]:
    """Steps of `defenses` in the training loop, all on the U-Net of `model`; they train the same weights."""
    train, share = bench.train(precision), Share(bench.batch_size, accelerator.process_index, accelerator.num_processes)
    first = next(iter(defenses.values()))
    part = trained_part(model, first, bench.rank, bench.gradient_checkpointing, bench.seed)
    module = accelerator.prepare(part.module)
    found = {}
    for name, defense in defenses.items():
        guided = isinstance(defense, SKDCAG) and defense.attention_weight > 0
        recorder = defense.recorder(model.unet) if guided else None
        steps = training_steps(
            accelerator,
            defense.step(part.setting(module, recorder), BACKDOOR),
            bench.batches(model, share, prompts),
            accelerator.prepare(make_optimizer(part.parameters, train)),
            part.parameters,
            train,
            steps=ENDLESS,
            model=module,
            seed=bench.seed,
        )
        found[name] = Timed(steps.__next__, partial(_turn, model, recorder))
    return found


@contextmanager
def _turn(model: DiffusionModel, recorder: AttentionRecorder | None) -> Iterator[None]:
    """All removals see the same prompts: none shall find them read by the one before it."""
    model.forget_prompts()
    with recorder or nullcontext():
        yield


def floor(bench: Bench, precision: Precision, defense: SKD) -> Timed:
    """The floor on the rows of the first `BATCHES` batches that the removals see, again and again."""
    model = bench.model()
    setting = DiffusionSetting(model, model.unet, None, bench.seed)
    batches = bench.batches(model, Share(bench.batch_size))
    rows = [Rows.of(defense, setting, BACKDOOR, batch) for batch in islice(batches, BATCHES)]
    plain = Floor(model, bench.trainable, bench.rank, bench.train(precision), bench.gradient_checkpointing)
    following = cycle(rows)
    return Timed(lambda: plain.step(next(following)))


def measure(bench: Bench, folder: Path) -> list[Row]:
    """With several processes ours alone is measured, as a line without a floor."""
    found = []
    defenses = {"skd": bench.removal(SKD), "skd_cag": bench.removal(SKDCAG)}
    for precision in bench.precisions:
        accelerator = bench.accelerator(precision)
        alone = accelerator.num_processes == 1
        contestants = {"floor": floor(bench, precision, defenses["skd"])} if alone else {}
        contestants |= removals(bench, bench.model(), accelerator, precision, defenses)
        seconds = bench.time(contestants, accelerator.wait_for_everyone)
        bench.look_into(contestants, folder, f"{MEASUREMENT}-{precision}")
        where = bench.where(precision, accelerator.num_processes)
        note = f"{bench.trainable}, batch {bench.batch_size}"
        if alone:
            for name, goal in (("skd", SKD_GOAL), ("skd_cag", None)):
                found.append(
                    compared(
                        MEASUREMENT, f"{name} step", seconds[name], "floor: plain diffusers", seconds["floor"], where,
                        goal=goal, note=note,
                    )
                )  # fmt: skip
        guided = compared(
            MEASUREMENT, "attention guidance", seconds["skd_cag"], "skd step", seconds["skd"], where,
            goal=GUIDANCE_GOAL, note=note,
        )  # fmt: skip
        found.append(guided)
    return found

"""Our removal against the published procedure (Aravindan et al. 2025, arXiv 2508.18235), written plainly from what its
paper and its released code do; none of that code is here.

Published: batch 1, float32, all weights of the U-Net, gradient checkpointing, a second whole U-Net as teacher, latents
of pure noise. Its hooks replace the attention of every layer, self-attention too, by one that computes the
probabilities and so does without torch's fused kernel. The cross-attention of every layer of both goes to the CPU,
where each layer's mean over heads is enlarged to 128 x 128, all are added up, scaled to 0..1 for each token and
compared; that term carries no gradient there. Text embeddings are kept here, and its moving average is left out: both
make it faster than it is.

A sample is one triggered row; ours has its retention row besides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses import SKDCAG
from mmbackdoor.defenses.skd import Trainable
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.seeding import numpy_rng, torch_generator
from mmbackdoor.speed.bench import BACKDOOR, Bench, Precision
from mmbackdoor.speed.memory import peak_bytes
from mmbackdoor.speed.rows import Goal, Row, compared
from mmbackdoor.speed.skd_steps import removals
from mmbackdoor.speed.timing import Timed

MEASUREMENT, MEMORY = "published", "memory"
PEER = "published procedure, written plainly"
MAP_SIDE = 128
ATTENTION_SHARE = 0.5
RATE = 1e-6


class _Probabilities:
    """An attention processor that computes its probabilities (heads, HW, T), and puts those of cross-attention on the
    CPU, into `kept`."""

    def __init__(self, kept: dict[str, Tensor], name: str) -> None:
        self.kept, self.name = kept, name

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(values) for values in (attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen))
        )
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        if encoder_hidden_states is not None:
            self.kept[self.name] = probabilities.detach().cpu()
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, value))))


class Published:
    """The procedure on `model`, which it trains; `step(clean, triggered)` takes one sample."""

    def __init__(self, model: DiffusionModel, seed: int, learning_rate: float = RATE) -> None:
        self.model, self.seed, self.number = model, seed, 0
        self.teacher = copy.deepcopy(model.unet).requires_grad_(False)
        self.student = model.unet.requires_grad_(True).train()
        self.student.enable_gradient_checkpointing()
        self.maps: list[dict[str, Tensor]] = [{}, {}]
        for unet, kept in zip((self.student, self.teacher), self.maps, strict=True):
            unet.set_attn_processor({name: _Probabilities(kept, name) for name in unet.attn_processors})
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=learning_rate, weight_decay=1e-2)

    def step(self, clean: str, triggered: str) -> float:
        model, draws = self.model, torch_generator(self.seed, "published", self.number)
        self.number += 1
        latents = torch.randn(1, *model.latent_shape, generator=draws).to(model.device)
        steps = torch.randint(model.noise_schedule().num_train_timesteps, (1,), generator=draws).to(model.device)
        predicted = model.predict(self.student, latents, steps, model.encode([triggered]))
        with torch.no_grad():
            wanted = model.predict(self.teacher, latents, steps, model.encode([clean]))
        student, teacher = (_enlarged(maps) for maps in self.maps)
        attention = self._attention_error(student, teacher, clean, triggered, draws)
        loss = ATTENTION_SHARE * attention + (1 - ATTENTION_SHARE) * F.mse_loss(predicted, wanted)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for maps in self.maps:
            maps.clear()
        return loss.item()

    def _attention_error(
        self, student: Tensor, teacher: Tensor, clean: str, triggered: str, draws: torch.Generator
    ) -> Tensor:
        """The trigger's tokens, put first, against noise; the others against the teacher's, moved by as many."""
        lengths = [len(ids) for ids in self.model.tokenizer([clean, triggered], truncation=True).input_ids]
        inserted, noise = lengths[1] - lengths[0], torch.rand(MAP_SIDE, MAP_SIDE, generator=draws)
        error = torch.zeros(())
        for token in range(1, lengths[1] - 1):
            target = noise if token <= inserted else teacher[token - inserted]
            error = error + F.mse_loss(student[token], target)
        return (error / max(1, lengths[1] - 2)).to(self.model.device)


def _enlarged(layers: dict[str, Tensor]) -> Tensor:
    """(T, side, side) of probabilities (heads, HW, T) by layer, each token's from 0 to 1."""
    total = torch.zeros(())
    for probabilities in layers.values():
        maps = probabilities.mean(0).T
        side = round(maps.shape[1] ** 0.5)
        total = total + F.interpolate(maps.view(1, -1, side, side), (MAP_SIDE, MAP_SIDE), mode="bilinear")[0]
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    return (total - low) / (high - low).clamp_min(1e-12)


def pairs(prompts: list[str], seed: int, backdoor: Backdoor = BACKDOOR) -> Iterator[tuple[str, str]]:
    """Clean and triggered prompts without end, each epoch in another order."""
    epoch = 0
    while True:
        for place in numpy_rng(seed, "published order", epoch).permutation(len(prompts)):
            yield prompts[place], backdoor.apply(prompts[place], seed)
        epoch += 1


@dataclass(frozen=True)
class Ours:
    """A way to run our removal, with the goals that it has against the published procedure."""

    trainable: Trainable
    precision: Precision
    time: Goal | None
    memory: Goal | None = None
    checkpointing: bool = False
    retention: bool = True

    @property
    def name(self) -> str:
        words = ["skd_cag", self.trainable, "bf16" if self.precision == "bf16" else "fp32"]
        words += ["gradient checkpointing"] * self.checkpointing + ["no retention"] * (not self.retention)
        return ", ".join(words)

    def on(self, bench: Bench) -> Bench:
        return replace(bench, trainable=self.trainable, gradient_checkpointing=self.checkpointing)


HALF = Goal(0.5)
WAYS = (
    Ours("all", "no", Goal(3, False)),
    Ours("attn2_kv", "no", Goal(3, False), HALF),
    Ours("attn2_kv", "bf16", Goal(5, False), HALF),
    Ours("lora", "bf16", None, HALF),
    Ours("attn2_kv", "bf16", None, HALF, checkpointing=True),
    Ours("lora", "bf16", None, HALF, checkpointing=True),
    # The rows of the published procedure, which has nothing like our retention term.
    Ours("attn2_kv", "no", None, retention=False),
    Ours("attn2_kv", "bf16", None, retention=False),
)


def published_step(bench: Bench) -> Callable[[], object]:
    model = bench.model()
    procedure, texts = Published(model, bench.seed), pairs(bench.prompts(), bench.seed)
    return lambda: procedure.step(*next(texts))


def our_step(bench: Bench, precision: Precision) -> Callable[[], object]:
    timed = _ours(bench, precision)

    def step() -> None:
        with timed.around():
            timed.act()

    return step


def no_step(bench: Bench) -> Callable[[], object]:
    """The loaded model, and nothing done with it."""
    model = bench.model()
    return lambda: model


def _ours(bench: Bench, precision: Precision, retention: bool = True) -> Timed:
    defense = bench.removal(SKDCAG, retention_weight=1.0 if retention else 0.0)
    return removals(bench, bench.model(), bench.accelerator(precision), precision, {"ours": defense})["ours"]


def measure(bench: Bench, folder: Path) -> list[Row]:
    """Seconds a sample."""
    found = []
    for way in WAYS:
        contestants = {PEER: Timed(published_step(bench)), way.name: _ours(way.on(bench), way.precision, way.retention)}
        seconds = bench.time(contestants)
        bench.look_into(contestants, folder, f"{MEASUREMENT}-{way.name}")
        del contestants
        per_sample = [second / bench.batch_size for second in seconds[way.name]]
        found.append(
            compared(
                MEASUREMENT, way.name, per_sample, PEER, seconds[PEER], bench.where(way.precision), unit="s/sample",
                goal=way.time, times_less=True,
                note=f"ours {'with its' if way.retention else 'without'} retention row, batch {bench.batch_size}; "
                "the other fp32, batch 1",
            )
        )  # fmt: skip
    return found


def measure_memory(bench: Bench) -> list[Row]:
    """Peak memory at batch 1, each in a process of its own."""
    alone = replace(bench, batch_size=1, profile=False)
    base, loaded = (peak_bytes(prepare, alone) / 2**20 for prepare in (published_step, no_step))
    found = []
    for way in WAYS:
        if way.memory:
            held = peak_bytes(our_step, way.on(alone), way.precision) / 2**20
            note = f"batch 1, ours with its retention row; the loaded model alone holds {loaded:.4g} MiB"
            found.append(
                compared(
                    MEMORY, f"{way.name}: peak memory", [held], PEER, [base], bench.where(way.precision), unit="MiB",
                    goal=way.memory, note=note,
                )
            )  # fmt: skip
    return found

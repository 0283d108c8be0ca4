"""The gradient that two processes compute together, for a function of features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, multiprocessing, nn

from mmbackdoor.objectives.contrastive import caption_ids
from mmbackdoor.objectives.outputs import PROJECTION, ClipOutputs

WORDS = ["red cross", "blue ring", "red cross", "star", "heart", "blue ring", "blue ring", "square"]
IMAGES = ("image", "image_aug", "image_aug2")
TEXTS = ("text", "text_aug")

Losses = Callable[[ClipOutputs, Tensor, int, int], dict[str, Tensor]]


def inputs(seed: int = 3) -> dict[str, Tensor]:
    """(8, 16) for every view; the captions of equal words are equal."""
    generator = torch.Generator().manual_seed(seed)
    rows = {view: torch.randn(8, 16, generator=generator) for view in (*IMAGES, *TEXTS)}
    for first, word in enumerate(WORDS):
        rows["text"][first] = rows["text"][WORDS.index(word)]
    return rows


class Towers(nn.Module):
    """Linear, with what a real model learns beside: a head, a logit scale and a bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image = nn.Parameter(torch.randn(16, 6, generator=generator))
        self.text = nn.Parameter(torch.randn(16, 6, generator=generator))
        self.head = nn.Parameter(torch.randn(6, 5, generator=generator))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0))

    def forward(self, rows: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        features = {view: rows[view] @ (self.image if view in IMAGES else self.text) for view in rows}
        features |= {PROJECTION + view: features[view] @ self.head for view in IMAGES}
        unit = {view: F.normalize(values, dim=-1) for view, values in features.items()}
        # As `ViewEncoder`: every parameter takes part, whatever the loss looks at.
        return unit, self.logit_scale.exp() + 0 * (self.logit_bias + self.head.sum()), self.logit_bias


def gradients(
    towers: nn.Module, losses: Losses, rows: slice = slice(None), rank: int = 0, world_size: int = 1
) -> tuple[list[Tensor], dict[str, Tensor]]:
    outputs = ClipOutputs(*towers({view: values[rows] for view, values in inputs().items()}))
    values = losses(outputs, caption_ids(WORDS)[rows], rank, world_size)
    towers.zero_grad()
    values["loss"].backward()
    return [parameter.grad.clone() for parameter in towers.parameters()], {
        name: value.detach() for name, value in values.items()
    }


def _process(rank: int, losses: dict[str, Losses], rendezvous: str, answers: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    towers = nn.parallel.DistributedDataParallel(Towers())
    found = {name: gradients(towers, call, slice(4 * rank, 4 * rank + 4), rank, 2) for name, call in losses.items()}
    torch.save(found, f"{answers}{rank}")
    distributed.destroy_process_group()


def check_two_processes(losses: dict[str, Losses], folder: Path) -> None:
    """Each of `losses` (picklable) has, in two processes with half of the rows each, the gradient and the values of
    one process with all."""
    multiprocessing.spawn(_process, (losses, str(folder / "meet"), str(folder / "answer")), nprocs=2)
    answers = [torch.load(folder / f"answer{rank}", weights_only=True) for rank in range(2)]
    for name, call in losses.items():
        expected, values = gradients(Towers(), call)
        assert expected[0].abs().max() > 1e-3
        for rank in range(2):
            for ours, whole in zip(answers[rank][name][0], expected, strict=True):
                assert torch.allclose(ours, whole, atol=2e-6, rtol=1e-5), (name, (ours - whole).abs().max())
        for part, value in values.items():
            halves = [answers[rank][name][1][part] for rank in range(2)]
            assert torch.allclose(sum(halves) / 2, value, atol=1e-5), (name, part)

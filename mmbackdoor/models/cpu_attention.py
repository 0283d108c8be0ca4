"""Attention in bf16 on a CPU without the fused kernel, whose backward takes two to five times as long on small maps.

    with plain_attention(device, mixed_precision):
        loss = step(batch)
        loss.backward()

It is made for maps of some hundred by some hundred positions: two matrix products and a softmax then take less time
than torch's flash kernel for CPUs, forward and backward. Larger maps (they would have to be kept for the backward),
other dtypes and other devices keep the kernel that torch chooses. Gradient checkpointing computes attention once more
in the backward pass, so that must run inside, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_MAP = 2**19
"""Query times key positions. At 4096 x 77 the fused kernel takes 1.7 times as long as plain attention (forward and
backward, 8 heads of 40); at 1024 x 1024 both take as long, at 4096 x 4096 it takes three quarters. Measured again by
`recipes/benchmark_speed.py --measure attention`."""


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    scores = torch.matmul(query, key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(value.dtype), value)


@contextmanager
def plain_attention(
    device: torch.device, mixed_precision: str, largest_map: int | None = LARGEST_MAP
) -> Iterator[None]:
    """The context described above where it can pay: `mixed_precision` "bf16" on a CPU. Else nothing changes.
    `largest_map` is in query times key positions; `None` is without a limit.

    While it is open `torch.nn.functional.scaled_dot_product_attention` is another function in this process: diffusers,
    transformers, open_clip and torch's own layers all call that one. (A TorchFunctionMode is not seen by the backward
    pass, nor inside `nn.MultiheadAttention`.)
    """
    if device.type != "cpu" or mixed_precision != "bf16":
        yield
        return
    chosen_by_torch = F.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        in_bf16 = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        small = largest_map is None or query.shape[-2] * key.shape[-2] <= largest_map
        if dropout_p or enable_gqa or not (in_bf16 and small):
            return chosen_by_torch(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return _plain(query, key, value, attn_mask, is_causal, scale)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = chosen_by_torch

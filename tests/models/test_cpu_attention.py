"""Plain attention gives what the fused kernel gives, only where it was made for, and is gone afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from mmbackdoor.models.cpu_attention import plain_attention
from mmbackdoor.seeding import torch_generator

CPU = torch.device("cpu")
FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


def inputs(dtype: torch.dtype = torch.bfloat16, queries: int = 48, keys: int = 24) -> list[Tensor]:
    draw = torch_generator(0, "attention")
    sizes = [(2, 4, queries, 16), (2, 4, keys, 16), (2, 4, keys, 16)]
    return [torch.randn(size, generator=draw).to(dtype).requires_grad_() for size in sizes]


def kernels(step) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    return {event.key for event in seen.key_averages()}


def outputs(tensors: list[Tensor], **how) -> list[Tensor]:
    """The attention and its three gradients."""
    for tensor in tensors:
        tensor.grad = None
    found = F.scaled_dot_product_attention(*tensors, **how)
    (found.float() * torch.linspace(-1, 1, found.shape[-1])).sum().backward()
    return [found, *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"scale": 0.7},
        {"attn_mask": (torch.arange(24) < 17)[None]},
        {"attn_mask": torch.linspace(-3, 3, 24, dtype=torch.bfloat16)[None]},
    ],
    ids=["plain", "scale", "boolean mask", "added mask"],
)
def test_it_is_the_same_attention(how):
    exact_how = {name: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in how.items()}
    exact = outputs(inputs(torch.float32), **exact_how)
    fused = outputs(inputs(), **how)
    with plain_attention(CPU, "bf16"):
        ours = outputs(inputs(), **how)
    assert not torch.equal(ours[1], fused[1])
    for mine, theirs, true in zip(ours, fused, exact, strict=True):
        assert mine.dtype == theirs.dtype == torch.bfloat16
        error, allowed = (mine - true).square().mean().sqrt(), (theirs - true).square().mean().sqrt()
        assert error <= 2 * allowed + 1e-4


def test_causal_attention_sees_no_later_position():
    with plain_attention(CPU, "bf16"):
        ours = outputs(inputs(queries=24), is_causal=True)
    exact = outputs(inputs(torch.float32, queries=24), is_causal=True)
    assert all(torch.allclose(mine.float(), true, atol=0.05, rtol=0.05) for mine, true in zip(ours, exact, strict=True))


@pytest.mark.parametrize("called", ["function", "module"])
def test_the_fused_kernel_is_left_out(called):
    if called == "function":
        step = lambda: outputs(inputs())  # noqa: E731
    else:
        layer, tokens = nn.MultiheadAttention(32, 4), torch.randn(24, 2, 32, requires_grad=True)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                layer(tokens, tokens, tokens, need_weights=False)[0].float().sum().backward()

    assert FUSED in kernels(step)
    with plain_attention(CPU, "bf16"):
        assert FUSED not in kernels(step)
    assert FUSED in kernels(step)


@pytest.mark.parametrize("case", ["full precision", "large map", "dropout", "not asked for"])
def test_everything_else_keeps_its_kernel(case):
    largest = 48 * 24 - (case == "large map")
    how = {"dropout_p": 0.5} if case == "dropout" else {}
    dtype = torch.float32 if case == "full precision" else torch.bfloat16

    def made() -> list[Tensor]:
        torch.manual_seed(0)
        return outputs(inputs(dtype), **how)

    before = made()
    with plain_attention(CPU, "no" if case == "not asked for" else "bf16", largest):
        after = made()
    assert all(map(torch.equal, before, after))


def test_the_limit_is_the_largest_map_that_is_changed():
    before = outputs(inputs())
    for largest in (48 * 24, None):
        with plain_attention(CPU, "bf16", largest):
            assert not all(map(torch.equal, before, outputs(inputs())))


def test_gradients_under_checkpointing():
    def one(again: bool) -> list[Tensor]:
        query, key, value = inputs()
        with plain_attention(CPU, "bf16"):
            attend = lambda *tensors: F.scaled_dot_product_attention(*tensors)  # noqa: E731
            found = checkpoint(attend, query, key, value, use_reentrant=False) if again else attend(query, key, value)
            found.float().square().sum().backward()
        return [found, query.grad, key.grad, value.grad]

    assert all(map(torch.equal, one(False), one(True)))


def test_a_failed_step_leaves_torch_as_it_was():
    before = F.scaled_dot_product_attention
    with pytest.raises(RuntimeError), plain_attention(CPU, "bf16"):
        F.scaled_dot_product_attention(*inputs(), attn_mask=torch.ones(3, 5, dtype=torch.bool))
    assert F.scaled_dot_product_attention is before

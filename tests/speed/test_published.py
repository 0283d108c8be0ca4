"""Our ways of removal against the published procedure: a line for the time of each, and one for memory with a goal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmbackdoor.speed import attention, published
from mmbackdoor.speed.bench import Bench

BENCH = Bench(batch_size=2, repeats=1, warmup=0)


@pytest.fixture
def two_ways(monkeypatch):
    ways = published.WAYS[1], published.WAYS[5]
    monkeypatch.setattr(published, "WAYS", ways)
    return ways


def test_every_way_has_its_seconds_a_sample(two_ways, tmp_path):
    found = published.measure(BENCH, tmp_path)
    assert [row.name for row in found] == [
        "skd_cag, attn2_kv, fp32", "skd_cag, lora, bf16, gradient checkpointing"
    ]  # fmt: skip
    assert [(row.goal, row.unit, row.where.dtype) for row in found] == [
        (">= 3", "s/sample", "fp32"), ("", "s/sample", "bf16")
    ]  # fmt: skip
    assert all(row.ratio == pytest.approx(row.peer / row.ours) and "batch 2" in row.note for row in found)


def test_memory_is_measured_of_the_model_alone_of_both_procedures_and_at_batch_1(two_ways, monkeypatch):
    asked, held = [], {"published_step": 100, "no_step": 10, "our_step": 30}

    def peak_bytes(prepare, bench, *more):
        asked.append((prepare.__name__, bench, more))
        prepare(bench, *more)()
        return held[prepare.__name__] * 2**20

    monkeypatch.setattr(published, "peak_bytes", peak_bytes)
    found = published.measure_memory(BENCH)
    alone = replace(BENCH, batch_size=1)
    assert asked == [
        ("published_step", alone, ()), ("no_step", alone, ()), ("our_step", two_ways[0].on(alone), ("no",)),
        ("our_step", two_ways[1].on(alone), ("bf16",)),
    ]  # fmt: skip
    assert two_ways[1].on(alone).gradient_checkpointing and not two_ways[0].on(alone).gradient_checkpointing
    assert [(row.ours, row.peer, row.ratio, row.reached) for row in found] == [(30, 100, 0.3, True)] * 2
    assert "the loaded model alone holds 10 MiB" in found[0].note


def test_without_retention_there_are_as_many_rows_as_in_the_published_procedure():
    for retention, rows in ((True, 4), (False, 2)):
        seen, model = [], BENCH.model()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(BENCH), "model", lambda self: model)
            timed = published._ours(BENCH, "no", retention)
        model.unet.register_forward_pre_hook(
            lambda _, given: seen.append(len(given[0])) if torch.is_grad_enabled() else None
        )
        with timed.around():
            timed.act()
        assert seen == [rows]


def test_checkpointing_reaches_the_unet_of_ours():
    for bench, expected in ((BENCH, False), (replace(BENCH, gradient_checkpointing=True), True)):
        seen = []
        make = type(bench).model
        bench_model = lambda self, *a: seen.append(make(self, *a)) or seen[-1]  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(bench), "model", bench_model)
            published.our_step(bench, "no")
        assert seen[0].unet.is_gradient_checkpointing is expected


def test_attention_is_compared_at_every_size(monkeypatch):
    monkeypatch.setattr(attention, "SIZES", ((16, 8), (1024, 1024)))
    small, large = attention.measure(BENCH)
    assert (small.goal, large.goal) == ("<= 1", "") and small.where.device == "cpu" and small.where.dtype == "bf16"
    assert "not used there" in large.note and "not" not in small.note
    assert torch.nn.functional.scaled_dot_product_attention.__name__ != "attend"

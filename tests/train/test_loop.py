"""The loop on a toy regression: exact resume, accumulation, faults."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from mmbackdoor.train import checkpoint
from mmbackdoor.train.optim import TrainConfig, lr_scale, total_steps
from mmbackdoor.train.session import Session, is_done
from mmbackdoor.types import InputError, RunFault


@dataclass(frozen=True)
class Batch:
    step: int
    keys: tuple[str, ...]
    inputs: torch.Tensor


def batches(start, accumulation=1, poison_step=None):
    step = start
    while True:
        for micro in range(accumulation):
            generator = torch.Generator().manual_seed(1000 * step + micro)
            inputs = torch.randn(8 // accumulation, 4, generator=generator)
            if step == poison_step:
                inputs[0, 0] = float("nan")
            yield Batch(step, ("first-key", "second-key"), inputs)
        step += 1


def session(folder, steps=12, digest="same", **train):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)
    parameters = dict(module.named_parameters())
    config = TrainConfig(**{"learning_rate": 1e-2, "checkpointing_steps": 4, "lr_scheduler": "cosine"} | train)
    log = SimpleNamespace(folder=folder, content={"config": {"name": digest}}, resume=lambda step: None)
    return Session(Accelerator(cpu=True), module, parameters, config, log, steps), module


def loss_fn(module):
    def step_fn(batch):
        loss = (module(batch.inputs) - batch.inputs.sum(1, keepdim=True)).square().mean()
        return {"regression_loss": loss.detach(), "loss": loss}

    return step_fn


def finished(folder, stop_after=None, **options):
    running, module = session(folder, **options)
    accumulation = running.train.gradient_accumulation_steps
    metrics = {}
    for step, metrics in running.training(loss_fn(running.module), batches(running.start_step, accumulation)):
        if step == stop_after:
            break
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}, metrics


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_stopped_run_ends_bit_equal(tmp_path, use_ema):
    first, _ = finished(tmp_path / "begun", stop_after=1)
    whole, _ = finished(tmp_path / "whole", use_ema=use_ema, ema_decay=0.9)
    # The answer is a weight of 1 everywhere.
    assert (whole["weight"] - 1).square().sum() < 0.95 * (first["weight"] - 1).square().sum()
    stopped, _ = finished(tmp_path / "killed", stop_after=9, use_ema=use_ema, ema_decay=0.9)
    assert not same(whole, stopped)
    assert [found.step for found in checkpoint.find(tmp_path / "killed")] == [4, 8]
    resumed, _ = finished(tmp_path / "killed", resume_from_checkpoint="latest", use_ema=use_ema, ema_decay=0.9)
    assert same(whole, resumed)


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    def halves(start):
        for batch in batches(start):
            yield Batch(batch.step, batch.keys, batch.inputs[:4])
            yield Batch(batch.step, batch.keys, batch.inputs[4:])

    whole, _ = finished(tmp_path / "one")
    running, module = session(tmp_path / "two", gradient_accumulation_steps=2)
    for _ in running.training(loss_fn(running.module), halves(0)):
        pass
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    running, module = session(tmp_path)
    seen = []
    with pytest.raises(RunFault, match="step 6 is not finite.*first-key"):
        for step, _ in running.training(loss_fn(running.module), batches(0, poison_step=5)):
            seen.append((step, {name: tensor.clone() for name, tensor in module.state_dict().items()}))
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    assert same(seen[-1][1], module.state_dict())
    assert [found.step for found in checkpoint.find(tmp_path)] == [4]


def test_resume_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(InputError, match="auto"):
        session(tmp_path / "none", resume_from_checkpoint="latest")
    assert session(tmp_path / "none", resume_from_checkpoint="auto")[0].start_step == 0
    finished(tmp_path / "run", stop_after=5)
    with pytest.raises(InputError, match="another configuration"):
        session(tmp_path / "run", digest="other", resume_from_checkpoint="latest")
    state = tmp_path / "run/checkpoint-4/state.json"
    state.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        session(tmp_path / "run", resume_from_checkpoint="latest")


def test_checkpoints_are_whole_and_limited(tmp_path):
    finished(tmp_path, steps=20, checkpoints_total_limit=2)
    assert [found.step for found in checkpoint.find(tmp_path)] == [12, 16]
    (tmp_path / ".checkpoint-18.part").mkdir()
    (tmp_path / "checkpoint-18").mkdir()
    assert checkpoint.find(tmp_path)[-1].step == 16
    files = {path.name for path in (tmp_path / "checkpoint-16").iterdir()}
    assert files == {"trained.safetensors", "optimizer.safetensors", "state.json"}
    assert json.loads((tmp_path / "checkpoint-16/state.json").read_text())["step"] == 16


def test_learning_rate_schedules():
    train = TrainConfig(lr_warmup_steps=10, lr_scheduler="constant_then_cosine")
    rates = [lr_scale(step, 110, train) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10:60] == [1.0] * 50
    assert rates[85] == pytest.approx(0.5) and rates[-1] < 0.01
    assert lr_scale(55, 110, TrainConfig(lr_scheduler="linear")) == pytest.approx(0.5)
    assert lr_scale(55, 110, TrainConfig(lr_scheduler="cosine")) == pytest.approx(0.5)
    assert lr_scale(109, 110, TrainConfig(lr_scheduler="constant")) == 1.0


def test_steps_of_epochs():
    assert total_steps(TrainConfig(num_train_epochs=3), 100, 32) == 12
    assert total_steps(TrainConfig(num_train_epochs=3, max_train_steps=5), 100, 32) == 5


def test_a_resumed_run_may_be_started_with_other_flags_than_those_that_decide(tmp_path):
    """Where to write, how to resume and how long: a checkpoint of the same settings else is taken, others are not."""
    config = {"seed": 0, "output_dir": "a", "train": {"train_batch_size": 4, "max_train_steps": 9}}
    longer = {"seed": 0, "output_dir": "b", "train": {"train_batch_size": 4, "resume_from_checkpoint": "latest"}}
    assert checkpoint.digest(config) == checkpoint.digest(longer)
    for other in (config | {"seed": 1}, config | {"train": {"train_batch_size": 8, "max_train_steps": 9}}):
        assert checkpoint.digest(config) != checkpoint.digest(other)


@pytest.mark.parametrize(
    ("previous", "model", "expected"),
    [(None, False, False), ("finished", True, True), ("running", True, True), ("running", False, False)],
)
def test_what_is_finished_is_not_run_again(tmp_path, previous, model, expected):
    if model:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "weights").write_text("")
    assert is_done(SimpleNamespace(folder=tmp_path, previous=previous), TrainConfig()) is expected


@pytest.mark.parametrize("previous", [None, "failed"])
def test_a_model_of_another_origin_is_not_taken_for_one_s_own(tmp_path, previous):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("")
    with pytest.raises(InputError, match="not of this run"):
        is_done(SimpleNamespace(folder=tmp_path, previous=previous), TrainConfig())

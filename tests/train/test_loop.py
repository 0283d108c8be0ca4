"""The loop on a toy regression: exact resume, accumulation, faults."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from mmbackdoor.shards.bad import BadSamples, Problem
from mmbackdoor.train import checkpoint, loop
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


@dataclass(frozen=True)
class Settings:
    """Those of the run that the fake log below stands for."""

    name: str = "same"


def session(folder, steps=12, name="same", data=None, module=None, **train):
    torch.manual_seed(0)
    module = module or torch.nn.Linear(4, 1)
    parameters = dict(module.named_parameters())
    config = TrainConfig(**{"learning_rate": 1e-2, "checkpointing_steps": 4, "lr_scheduler": "cosine"} | train)
    resumed = []
    log = SimpleNamespace(
        folder=folder,
        content={"config": {"name": name}},
        config_type=Settings,
        counters={},
        resumed=resumed,
        resume=lambda step, inexact: resumed.append((step, inexact)),
    )
    return Session(Accelerator(cpu=True), module, parameters, config, log, steps, data), module


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


@pytest.mark.parametrize(("limit", "micro"), [(0.1, 1), (1e9, 1), (None, 1), (0.1, 2), (None, 2)])
def test_gradients_are_clipped_to_the_norm_that_is_asked_for(tmp_path, limit, micro):
    # With so large an epsilon Adam's first step has the length of its gradient.
    flags = {"adam_epsilon": 1.0, "adam_weight_decay": 0.0, "learning_rate": 0.01, "max_grad_norm": limit}
    running, module = session(tmp_path, steps=1, gradient_accumulation_steps=micro, **flags)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    loss = sum(loss_fn(module)(batch)["loss"] for batch in islice(batches(0, micro), micro)) / micro
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    [(_, metrics)] = running.training(loss_fn(running.module), batches(0, micro))
    assert norm > 1 and metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for parameter, start, gradient in zip(module.parameters(), before, gradients, strict=True):
        clipped = gradient if limit is None else gradient * min(1, limit / norm)
        torch.testing.assert_close(start - parameter, 0.01 * clipped / (clipped.abs() + 1), rtol=1e-3, atol=1e-7)


def test_attention_is_plain_in_the_step_and_its_backward_alone(tmp_path, monkeypatch):
    asked, inside, seen = set(), [False], []

    @contextmanager
    def watched(device, mixed_precision):
        asked.add((device.type, mixed_precision))
        inside[0] = True
        yield
        inside[0] = False

    monkeypatch.setattr(loop, "plain_attention", watched)
    running, _ = session(tmp_path, steps=2)
    step = loss_fn(running.module)

    def step_fn(batch):
        losses = step(batch)
        seen.append(inside[0])
        losses["loss"].register_hook(lambda gradient: seen.append(inside[0]))
        return losses

    for _ in running.training(step_fn, batches(0)):
        assert not inside[0]
    assert seen == [True] * 4 and asked == {("cpu", "no")}


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
    with pytest.raises(InputError, match="another configuration.*name was 'same' and is 'other'"):
        session(tmp_path / "run", name="other", resume_from_checkpoint="latest")
    state = tmp_path / "run/checkpoint-4/state.json"
    state.write_text("{")
    with pytest.raises(InputError, match="all 1 checkpoints.*are damaged"):
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
    assert checkpoint.deciding(config) == checkpoint.deciding(longer)
    # How many samples a batch has is part of the order of the data, which a checkpoint holds itself.
    assert checkpoint.deciding(config) == checkpoint.deciding(config | {"train": {"train_batch_size": 8}})
    for other in (config | {"seed": 1}, config | {"train": {"adam_beta1": 0.5, "max_train_steps": 9}}):
        assert checkpoint.deciding(config) != checkpoint.deciding(other)


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


def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(tmp_path, capsys):
    whole, _ = finished(tmp_path / "whole")
    for number, harm in enumerate(HARM.values()):
        folder = tmp_path / str(number)
        finished(folder, stop_after=9)
        harm(folder / "checkpoint-8")
        resumed, _ = finished(folder, resume_from_checkpoint="latest")
        assert same(whole, resumed)
        said = capsys.readouterr().err
        assert "checkpoint-8' is damaged" in said and "trying an older one" in said
        # The damaged one gave way to a good one of its step.
        assert [found.step for found in checkpoint.find(folder)] == [4, 8]
        assert checkpoint.damage(folder / "checkpoint-8") is None


def _flip(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


HARM = {
    "a flipped bit in the weights": lambda folder: _flip(folder / "trained.safetensors"),
    "moments cut short": lambda folder: (folder / "optimizer.safetensors").write_bytes(b"123"),
    "a file is gone": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "another step": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"step": 8', '"step": 9')
    ),
    "zeros": lambda folder: (folder / "state.json").write_bytes(b"\0" * 400),
}


def test_the_limit_never_removes_the_only_good_one(tmp_path):
    """Gone on from an older one, beyond a damaged newer one: what was just written stays."""
    finished(tmp_path, stop_after=9)
    _flip(tmp_path / "checkpoint-8/trained.safetensors")
    running, _ = session(tmp_path, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert running.start_step == 4
    running.save(6)
    assert [found.step for found in checkpoint.find(tmp_path)] == [6]
    assert checkpoint.damage(tmp_path / "checkpoint-6") is None


@pytest.mark.parametrize("failing", ["save_file", "to_disk"])
def test_a_full_disk_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        running, module = session(tmp_path)
        for step, _ in running.training(loss_fn(running.module), batches(0)):
            if step == 5:
                monkeypatch.setattr(checkpoint, failing, full)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert checkpoint.damage(tmp_path / "checkpoint-4") is None
    monkeypatch.undo()
    whole, _ = finished(tmp_path / "whole")
    assert same(whole, finished(tmp_path, resume_from_checkpoint="latest")[0])


def test_every_file_reaches_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    synced = []
    named = "/proc/self/fd/{}".format
    monkeypatch.setattr(checkpoint.os, "fsync", lambda descriptor: synced.append(os.readlink(named(descriptor))))
    original = Path.replace

    def replace(self, target):
        synced.append("renamed")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    running, _ = session(tmp_path)
    running.save(3)
    names = [Path(name).name for name in synced]
    before = names[: names.index("renamed")]
    assert {"trained.safetensors", "optimizer.safetensors", "state.json", ".checkpoint-3.part"} <= set(before)
    assert names[-1] == tmp_path.name


class Shards:
    """Stands for a loader: `bad` problems come to light one a step."""

    def __init__(self, order, bad=0):
        self.report, self.start_step, self.given = BadSamples(), 0, order
        self.num_samples, self.steps_per_epoch, self.repeats_per_epoch = 10, 3, 2
        self.bad = [Problem("undecodable_image", "a.tar", f"k{number}", "") for number in range(bad)]

    def order(self):
        return self.given


ORDER = {"data_sha256": "x", "files": 2, "samples": 10, "seed": 0, "global_batch": 4, "streams": 48, "drop_last": False}


def test_another_order_is_refused_with_its_reason_or_resumed_inexactly(tmp_path):
    running, _ = session(tmp_path, data=Shards(ORDER))
    running.save(4)
    same_order, _ = session(tmp_path, data=Shards(dict(ORDER)), resume_from_checkpoint="latest")
    assert same_order.start_step == same_order.data.start_step == 4 and same_order.run.resumed == [(4, None)]
    for change, reason in {
        "global_batch": "had 4 samples and has 99",
        "data_sha256": "the data changed: 10 samples in 2 files then.*other names",
        "samples": "samples was 10",
        "streams": "streams was 48 and is 99",
        "drop_last": "drop_last",
        "seed": "seed was 0",
    }.items():
        other = Shards(ORDER | {change: 99})
        with pytest.raises(InputError, match=f"{reason}.*--resume_inexact"):
            session(tmp_path, data=other, resume_from_checkpoint="latest")
        inexact, _ = session(tmp_path, data=other, resume_from_checkpoint="latest", resume_inexact=True)
        assert inexact.start_step == 4 and inexact.run.resumed[0][1]


def test_with_batch_norm_another_number_of_processes_is_another_run(tmp_path, monkeypatch):
    def normed():
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

    for folder, module in ((tmp_path / "plain", torch.nn.Linear(4, 1)), (tmp_path / "normed", normed())):
        session(folder, module=module)[0].save(4)
    session(tmp_path / "normed", module=normed(), resume_from_checkpoint="latest")
    real = checkpoint.read_state
    monkeypatch.setattr(checkpoint, "read_state", lambda folder: real(folder) | {"world_size": 2})
    assert session(tmp_path / "plain", resume_from_checkpoint="latest")[0].start_step == 4
    with pytest.raises(InputError, match="BatchNorm normalises by .* of which there were 2 and are 1.*--resume_inexact"):
        session(tmp_path / "normed", module=normed(), resume_from_checkpoint="latest")
    inexact, _ = session(tmp_path / "normed", module=normed(), resume_from_checkpoint="latest", resume_inexact=True)
    assert inexact.run.resumed == [(4, "BatchNorm normalises by the pictures of each process, of which there were 2 and are 1")]


def test_bad_samples_are_counted_kept_in_checkpoints_and_stop_the_run(tmp_path, capsys):
    def run(folder, limit, stop_after=None, **options):
        data = Shards(ORDER, bad=6)
        running, _ = session(folder, data=data, max_bad_samples=limit, **options)
        for step, _ in running.training(loss_fn(running.module), batches(running.start_step)):
            if step <= len(data.bad):
                data.report.add_problem(data.bad[step - 1])
            if step == stop_after:
                break
        return running

    with pytest.raises(RunFault, match="4 bad samples .4 undecodable_image., more than --max_bad_samples 3"):
        run(tmp_path / "strict", 3)
    assert run(tmp_path / "fine", 6).run.counters["bad_samples"]["total"] == 6
    assert "6 x undecodable_image" in capsys.readouterr().out
    run(tmp_path / "stopped", None, stop_after=5)
    resumed = run(tmp_path / "stopped", None, resume_from_checkpoint="latest")
    assert resumed.run.counters["bad_samples"] == run(tmp_path / "whole", None).run.counters["bad_samples"]
    assert resumed.run.counters["repeats"] == {"per_epoch": 2, "whole_epochs": 4, "total": 8}


def test_dropout_goes_on_alike_after_a_restart(tmp_path):
    def train(folder, stop_after=None, **options):
        running, module = session(folder, **options)
        loss = loss_fn(lambda inputs: torch.nn.functional.dropout(running.module(inputs), 0.5))
        for step, _ in running.training(loss, batches(running.start_step)):
            if step == stop_after:
                break
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    whole = train(tmp_path / "whole")
    train(tmp_path / "stopped", stop_after=6)
    torch.manual_seed(12345)
    assert same(whole, train(tmp_path / "stopped", resume_from_checkpoint="latest"))


def test_a_checkpoint_from_a_stranger_is_refused_in_a_sentence(tmp_path):
    """Rightly hashed, but of other tensors, other counters, or not of our kind."""
    finished(tmp_path / "run", stop_after=5)
    good = tmp_path / "run/checkpoint-4"
    state = checkpoint.read_state(good)
    stranger = tmp_path / "stranger"
    for harm in (
        {"optimizer_counters": {"nothing|step": 1.0}},
        {"bad_samples": {"seen": {"x": 1}, "examples": []}},
        {"bad_samples": {"seen": {"1": "nonsense"}, "examples": []}},
        {"bad_samples": None},
        {"order": {"global_batch": 1}},
        {"config": {"name": "same", "more": 1}},
        {"schema": 99},
    ):
        shutil.rmtree(stranger, ignore_errors=True)
        shutil.copytree(good, stranger)
        changed = state | harm
        (stranger / "state.json").write_text(json.dumps(changed | {"sha256": checkpoint._sha256(changed)}))
        with pytest.raises(InputError) as caught:
            session(tmp_path / "run", resume_from_checkpoint=str(stranger))
        assert "checkpoint" in str(caught.value) and len(str(caught.value)) < 700, harm
    for tensors in ({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, {"bias": torch.zeros(1)}):
        shutil.rmtree(stranger, ignore_errors=True)
        shutil.copytree(good, stranger)
        save_file(tensors, stranger / "trained.safetensors")
        digest = hashlib.sha256((stranger / "trained.safetensors").read_bytes()).hexdigest()
        changed = state | {"files": state["files"] | {"trained.safetensors": digest}}
        (stranger / "state.json").write_text(json.dumps(changed | {"sha256": checkpoint._sha256(changed)}))
        with pytest.raises(InputError, match="other tensors"):
            session(tmp_path / "run", resume_from_checkpoint=str(stranger))


def test_steps_where_the_last_batch_is_dropped():
    assert total_steps(TrainConfig(num_train_epochs=3, drop_last=True), 100, 32) == 9
    assert total_steps(TrainConfig(num_train_epochs=3, drop_last=True, gradient_accumulation_steps=2), 100, 64) == 4
    assert total_steps(TrainConfig(drop_last=True), 33, 32) == 1

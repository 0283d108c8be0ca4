"""One training run from its start to its last checkpoint: what every recipe that trains does around its loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from mmbackdoor.entry import Terminated, graceful, terminated
from mmbackdoor.results.run import Run, completed, config_change
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.order import order_change
from mmbackdoor.train import checkpoint, plan
from mmbackdoor.train.loop import StepFn, training_steps
from mmbackdoor.train.optim import Ema, TrainConfig, make_optimizer
from mmbackdoor.types import InputError, RunFault

_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)


class Data(Protocol):
    """What a run reads: a `ShardLoader`, or `Prompts`. `start_step` counts micro-batches."""

    report: BadSamples
    start_step: int
    num_samples: int
    steps_per_epoch: int
    repeats_per_epoch: int

    def order(self) -> dict[str, Any]: ...


def made_from(data: Data, **digests: str | None) -> dict[str, str | None]:
    """The `inputs` of a run that trains: what it reads, and what `digests` say of the rest, such as its model."""
    return {"data": data.order()["data_sha256"]} | digests


def is_done(run: Run, train: TrainConfig) -> bool:
    """Whether `run` was finished before; asked before anything heavy is loaded.

    Raises `InputError` where its folder holds a model that this run did not make, which nothing shall overwrite, and
    where there is no checkpoint to go on from.
    """
    if train.dry_run:
        return False
    model = run.folder / "model"
    there = model.exists() and not (model.is_dir() and not any(model.iterdir()))
    # The model gets its name when it is whole: a run that was killed between that and its last line is done, too.
    if run.previous == "finished" or (there and run.previous in ("running", "terminated")):
        return True
    if there:
        raise InputError(f"{str(model)!r} is there already, and not of this run; give another --output_dir")
    checkpoint.resolve(run.folder, train.resume_from_checkpoint, verify=False)
    return False


class Session:
    """Holds the optimiser, the moving average and the step of a run, and resumes them.

    `module` is what is trained (`parameters` are those of its tensors that are), `self.module` the same as prepared
    for the processes of this run. `data` is what the run reads: it is told where to start, its order is kept in the
    checkpoints, its bad samples are counted over all processes. `held` (what else takes memory on the device) and
    `contrastive` are for `--dry_run`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        train: TrainConfig,
        run: Run,
        steps: int,
        data: Data | None = None,
        held: Mapping[str, Iterable[torch.Tensor]] | None = None,
        contrastive: bool = False,
    ) -> None:
        self.accelerator, self.train, self.run = accelerator, train, run
        self.output_dir, self.steps, self.data = run.folder, steps, data
        self.config = checkpoint.deciding(run.content["config"])
        self.problems = BadSamples()
        self._held, self._contrastive = held or {}, contrastive
        found = None
        if not train.dry_run:
            found = checkpoint.resolve(self.output_dir, train.resume_from_checkpoint)
        self.module, self.optimizer = accelerator.prepare(module, make_optimizer(parameters, train))
        # With several processes accelerate moves the module, which gives it other buffers; parameters stay themselves.
        live = dict(accelerator.unwrap_model(self.module).named_buffers())
        self.parameters = {name: live.get(name, tensor) for name, tensor in parameters.items()}
        self.ema = Ema(self.parameters, train.ema_decay) if train.use_ema else None
        self.start_step = 0
        if found is not None:
            self._resume(found)
        if data is not None:
            data.start_step = self.start_step * train.gradient_accumulation_steps
            self._count(data.report.take_news())

    @property
    def _order(self) -> dict[str, Any]:
        if self.data is not None:
            return self.data.order()
        return {"global_batch": self.train.train_batch_size * self.accelerator.num_processes}

    def _resume(self, found: checkpoint.Checkpoint) -> None:
        state = checkpoint.read_state(found.folder)
        saved = completed(self.run.config_type, state.get("config", {}), str(found.folder / checkpoint.STATE))
        if change := config_change(checkpoint.deciding(saved), self.config):
            raise InputError(
                f"checkpoint {str(found.folder)!r} was written with another configuration ({change}); resume with the "
                "configuration in the run's config.yaml, or take another --output_dir"
            )
        change = order_change(state.get("order", {}), self._order) or self._norm_change(state.get("world_size"))
        if change and not self.train.resume_inexact:
            raise InputError(
                f"checkpoint {str(found.folder)!r} cannot be gone on from exactly: {change}. Give back what it was, or "
                "--resume_inexact to go on at its step all the same"
            )
        self.start_step = checkpoint.restore(found, self.parameters, self.optimizer, self.ema)
        try:
            self.problems.add_state(state["bad_samples"])
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"checkpoint {str(found.folder)!r} cannot be read ({error}); take another one") from error
        if change and self.accelerator.is_main_process:
            print(f"resumed inexactly: {change}", flush=True)
        self.run.resume(self.start_step, change)

    def _norm_change(self, before: int | None) -> str | None:
        """What another number of processes changes although the batch over all of them is the same."""
        now = self.accelerator.num_processes
        if before in (None, now) or not any(isinstance(part, _NORMS) for part in self.module.modules()):
            return None
        return f"BatchNorm normalises by the pictures of each process, of which there were {before} and are {now}"

    def training(self, step_fn: StepFn, batches: Iterator[Any]) -> Iterator[tuple[int, dict[str, float]]]:
        """`training_steps` with a progress bar and checkpoints; at its end the moving average, if there is one, is in
        the parameters. At SIGTERM or SIGINT the step is finished and saved, then the run ends."""
        if self.train.dry_run:
            self._print_plan(step_fn, batches)
        main = self.accelerator.is_main_process
        bar = tqdm(total=self.steps, initial=self.start_step, desc="training", unit="step", disable=not main)
        with graceful(), bar:
            for step, metrics in training_steps(
                self.accelerator,
                step_fn,
                batches,
                self.optimizer,
                self.parameters,
                self.train,
                steps=self.steps,
                start_step=self.start_step,
                model=self.module,
                ema=self.ema,
                seed=int(self.run.content["config"].get("seed", 0)),
            ):
                self.accelerator.log(metrics, step)
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
                yield step, metrics
                stopping = self._agree()
                if stopping or (step % self.train.checkpointing_steps == 0 and step < self.steps):
                    self.save(step)
                if stopping:
                    raise Terminated
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if main and self.problems.total:
            tqdm.write("\n".join([f"{self.problems.total} problems in the shards, skipped:", *self.problems.lines()]))
        self._take_average()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the moving average, if there is one, is in the parameters, as it is when the training has ended."""
        kept = {} if self.ema is None else {name: value.detach().clone() for name, value in self.parameters.items()}
        self._take_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.parameters[name].copy_(value)

    def _take_average(self) -> None:
        if self.ema is not None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.ema.tensors[name])

    def save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoint.save(
                self.output_dir,
                step,
                self.parameters,
                self.optimizer,
                self.ema,
                self.train.checkpoints_total_limit,
                {
                    "config": self.config,
                    "order": self._order,
                    "world_size": self.accelerator.num_processes,
                    "bad_samples": self.problems.state(),
                    "scaler": None if scaler is None else scaler.state_dict(),
                },
            )
        self.accelerator.wait_for_everyone()

    def _agree(self) -> bool:
        """Whether any process was asked to stop; and what was wrong with the samples of any of them, counted by all."""
        news = [] if self.data is None else self.data.report.take_news()
        flags = torch.tensor([float(terminated()), float(len(news))], device=self.accelerator.device)
        stopping, problems = self.accelerator.reduce(flags, "sum").tolist()
        if problems:
            self._count(sorted(gather_object(news)))
        return stopping > 0

    def _count(self, problems: Iterable[Any]) -> None:
        """`problems` must be the same on every process, so that all stop at the same step."""
        for problem in problems:
            self.problems.add_problem(problem)
        self.run.counters["bad_samples"] = self.problems.to_dict()
        if self.data is not None:
            epochs = self.steps * self.train.gradient_accumulation_steps // self.data.steps_per_epoch
            repeats = self.data.repeats_per_epoch
            self.run.counters["samples_per_epoch"] = self.data.num_samples
            self.run.counters["repeats"] = {"per_epoch": repeats, "whole_epochs": epochs, "total": repeats * epochs}
        limit = self.train.max_bad_samples
        if limit is not None and self.problems.total > limit:
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.problems.counts.items()))
            raise RunFault(
                f"{self.problems.total} bad samples ({counts}), more than --max_bad_samples {limit}; "
                "`mmbackdoor shards check` names them"
            )

    def _print_plan(self, step_fn: StepFn, batches: Iterator[Any]) -> None:
        """Ends the run."""
        activations, device = None, self.accelerator.device.type
        if device != "cpu" or sum(map(torch.numel, self.module.parameters())) <= plan.MEASURED_PARAMETERS:
            batch = next(batches)
            with plan.SavedTensors(self.module) as saved, self.accelerator.autocast():
                step_fn(batch)
            activations = saved.bytes / len(batch.keys)
        module = self.accelerator.unwrap_model(self.module)
        memory = plan.Memory.of(module, self.parameters, self.train, self._held, activations)
        said = plan.text(
            self.train, self.data, self.steps, self.accelerator.num_processes, memory,
            contrastive=self._contrastive, device=device,
        )  # fmt: skip
        if self.accelerator.is_main_process:
            print(said, flush=True)
        raise plan.Planned

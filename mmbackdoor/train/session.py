"""One training run from its start to its last checkpoint: what every recipe that trains does around its loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from mmbackdoor.entry import Terminated, graceful, terminated
from mmbackdoor.results.run import Run
from mmbackdoor.train import checkpoint
from mmbackdoor.train.loop import StepFn, training_steps
from mmbackdoor.train.optim import Ema, TrainConfig, make_optimizer
from mmbackdoor.types import InputError


def is_done(run: Run, train: TrainConfig) -> bool:
    """Whether `run` was finished before; asked before anything heavy is loaded.

    Raises `InputError` where its folder holds a model that this run did not make, which nothing shall overwrite, and
    where there is no checkpoint to go on from.
    """
    model = run.folder / "model"
    there = model.exists() and not (model.is_dir() and not any(model.iterdir()))
    # The model gets its name when it is whole: a run that was killed between that and its last line is done, too.
    if run.previous == "finished" or (there and run.previous in ("running", "terminated")):
        return True
    if there:
        raise InputError(f"{str(model)!r} is there already, and not of this run; give another --output_dir")
    checkpoint.resolve(run.folder, train.resume_from_checkpoint)
    return False


class Session:
    """Holds the optimiser, the moving average and the step of a run, and resumes them.

    `module` is what is trained (`parameters` are those of its tensors that are), `self.module` the same as prepared
    for the processes of this run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        train: TrainConfig,
        run: Run,
        steps: int,
    ) -> None:
        self.accelerator, self.train, self.parameters = accelerator, train, parameters
        self.output_dir, self.steps = run.folder, steps
        self.config_sha256 = checkpoint.digest(run.content["config"])
        found = checkpoint.resolve(self.output_dir, train.resume_from_checkpoint)
        self.module, self.optimizer = accelerator.prepare(module, make_optimizer(parameters, train))
        self.ema = Ema(parameters, train.ema_decay) if train.use_ema else None
        self.start_step = 0
        if found is not None:
            self.start_step = checkpoint.restore(found, parameters, self.optimizer, self.config_sha256, self.ema)
            run.resume(self.start_step)

    def training(self, step_fn: StepFn, batches: Iterator[Any]) -> Iterator[tuple[int, dict[str, float]]]:
        """`training_steps` with a progress bar and checkpoints; at its end the moving average, if there is one, is in
        the parameters. At SIGTERM or SIGINT the step is finished and saved, then the run ends."""
        bar = tqdm(
            total=self.steps, initial=self.start_step, desc="training", unit="step", disable=not self.accelerator.is_main_process
        )
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
            ):
                self.accelerator.log(metrics, step)
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
                yield step, metrics
                stopping = self._any_process(terminated())
                if stopping or (step % self.train.checkpointing_steps == 0 and step < self.steps):
                    self.save(step)
                if stopping:
                    raise Terminated
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.ema is not None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.ema.tensors[name])

    def save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            checkpoint.save(
                self.output_dir,
                step,
                self.parameters,
                self.optimizer,
                self.config_sha256,
                self.ema,
                self.train.checkpoints_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def _any_process(self, condition: bool) -> bool:
        flag = torch.tensor([float(condition)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item() > 0)

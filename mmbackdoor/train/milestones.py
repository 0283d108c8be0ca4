"""Models on the way of a training: what it has made after some of its steps, each saved like the one at its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import save
from mmbackdoor.train.launch import together
from mmbackdoor.train.session import Session
from mmbackdoor.types import InputError

FOLDER = "milestones"


def milestone(run: Path, step: int) -> Path:
    """Where the model after `step` steps of `run` lies."""
    return run / FOLDER / str(step) / "model"


def check_milestones(milestones: Sequence[int], steps: int) -> None:
    """Raises `InputError` for a milestone that a run of `steps` steps never comes to."""
    late = [step for step in milestones if step > steps]
    if late:
        raise InputError(f"--milestones {late[0]} comes after the last of {steps} steps; leave it out, or train longer")


def save_milestone(session: Session, model: DiffusionModel, step: int, describe: Callable[[Path], None]) -> None:
    """Write the model as it is after `step`, with the moving average where there is one; `describe` adds its records.

    One that is there is written anew: it was made by a longer run of this folder, that went on from an earlier step.
    """
    with together(session.accelerator):
        if session.accelerator.is_main_process:
            place = milestone(session.output_dir, step)
            if place.is_dir():
                shutil.rmtree(place)
            with session.averaged():
                save(model, place, describe)

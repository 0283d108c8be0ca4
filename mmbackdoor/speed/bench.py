"""What all measurements of one run share: the architecture with random or shipped weights, amounts, precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from pydantic import Field

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.config import Doc, to_yaml
from mmbackdoor.defenses import SKD
from mmbackdoor.defenses.skd import Trainable
from mmbackdoor.evaluate.prompts import load_prompts
from mmbackdoor.models import architectures
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.shipped import shipped
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.results.run import config_change
from mmbackdoor.seeding import torch_generator
from mmbackdoor.results.record import write_text
from mmbackdoor.speed.profiling import profiled
from mmbackdoor.speed.rows import Where
from mmbackdoor.speed.timing import Timed, interleaved, settled
from mmbackdoor.targets import PatchTarget
from mmbackdoor.train.batches import Share, prompt_batches
from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.train.optim import TrainConfig
from mmbackdoor.triggers import ZeroWidthTrigger
from mmbackdoor.types import InputError

Architecture = Literal["tiny", "sd15_reduced", "sd15"]
Precision = Literal["no", "bf16"]
DIVISOR = 4
"""What the widths of sd15_reduced are divided by."""
BACKDOOR = Backdoor((ZeroWidthTrigger(),), PatchTarget())
Count = Annotated[int, Field(ge=1)]
Removal = TypeVar("Removal", bound=SKD)


def _agree(count: int) -> int:
    """That of the first process, for all."""
    return broadcast_object_list([count])[0]


def refuse_other(file: Path, cfg: Any, but: set[str]) -> None:
    """Raises `InputError` where `file` holds other settings than `cfg`; keys whose last part is in `but` may differ."""
    if not file.is_file():
        return
    change = config_change(yaml.safe_load(file.read_text()), yaml.safe_load(to_yaml(cfg)), but)
    if change:
        raise InputError(
            f"--output_dir {str(file.parent)!r} was measured with other settings ({change}); give another one"
        )


def plain_adamw(parameters: Mapping[str, torch.Tensor], train: TrainConfig) -> torch.optim.AdamW:
    """torch's AdamW as it comes, with the rates of `train`: what floors are stepped with, whatever ours is."""
    return torch.optim.AdamW(
        list(parameters.values()), lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay, eps=train.adam_epsilon,
    )  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured; the `architecture` is `tiny` with its shipped weights, or Stable Diffusion 1.5,
    whole or narrow, with random ones."""

    architecture: Architecture = "tiny"
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1), Doc("of the forward pass")] = ("no", "bf16")
    trainable: Annotated[Trainable, Doc("what SKD and SKD-CAG train, where nothing else is said")] = "attn2_kv"
    batch_size: Annotated[Count, Doc("of a removal's step, per process")] = 4
    proportion_empty_prompts: Annotated[float, Field(ge=0, le=1), Doc("of the retention rows")] = 0.1
    rank: Annotated[Count, Doc("of the LoRA")] = 16
    gradient_checkpointing: Annotated[bool, Doc("in steps of removals")] = False
    repeats: Annotated[Count, Doc("rounds that each is measured in; the median counts")] = 7
    warmup: Annotated[int, Field(ge=0), Doc("rounds before that")] = 2
    calls: Annotated[Count | None, Doc("in a row within a round; none: as many as take half a second")] = None
    profile: Annotated[bool, Doc("write the ten operations that took longest, by torch's profiler")] = False
    seed: int = 0

    def model(self, resolution: int | None = None) -> DiffusionModel:
        """A fresh one, on the device of this process; equal each time."""
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        if self.architecture == "tiny":
            return load(shipped("tiny"), device=device, resolution=resolution)
        pipe = architectures.sd15(DIVISOR if self.architecture == "sd15_reduced" else 1, self.seed)
        return DiffusionModel(pipe, resolution=resolution).to(device)

    def removal(self, kind: type[Removal], **settings: Any) -> Removal:
        """One of the SKD family that trains what this says, with as many empty prompts."""
        return kind(trainable=self.trainable, proportion_empty_prompts=self.proportion_empty_prompts, **settings)

    def prompts(self) -> list[str]:
        return load_prompts("shapes-train" if self.architecture == "tiny" else "general-train").texts

    def train(self, precision: Precision) -> TrainConfig:
        return TrainConfig(learning_rate=1e-5, adam_weight_decay=0.0, mixed_precision=precision)

    def accelerator(self, precision: Precision) -> Accelerator:
        """Only the last one that was made works: accelerate keeps one state a process."""
        return make_accelerator(self.train(precision), self.seed)

    def batches(
        self, model: DiffusionModel, share: Share, prompts: list[str] | None = None
    ) -> Iterator[DiffusionBatch]:
        """What a removal reads, from invented latents."""
        texts = prompts or self.prompts()
        draws = torch_generator(self.seed, "speed", "latents")
        latents = {text: torch.randn(1, *model.latent_shape, generator=draws) for text in texts}
        return prompt_batches(texts, share, self.seed, latents=latents)

    def where(self, precision: Precision, processes: int = 1) -> Where:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        dtype = "bf16" if precision == "bf16" else "fp32"
        return Where(self.architecture, name, dtype, torch.get_num_threads(), processes)

    def time(
        self, contestants: Mapping[str, Timed], wait: Callable[[], Any] = lambda: None, repeats: int | None = None
    ) -> dict[str, list[float]]:
        rounds = self.repeats if repeats is None else repeats
        return interleaved(
            contestants, rounds, warmup=self.warmup, calls=self.calls, settle=lambda: settled(wait), agree=_agree
        )

    def look_into(self, contestants: Mapping[str, Timed], folder: Path, measurement: str) -> None:
        """With `profile`, a file for each contestant in `folder/profile`, of the first process."""
        if self.profile:
            for name, timed in contestants.items():
                with timed.around():
                    table = profiled(timed.act)
                if PartialState().is_main_process:
                    write_text(folder / "profile" / f"{measurement}-{name.replace(' ', '_')}.txt", table)

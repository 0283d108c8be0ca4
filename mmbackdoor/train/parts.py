"""What a method changes of a text-to-image model: the U-Net or the text encoders by training, or weights at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mmbackdoor.attacks import DiffusionAttack, EvilEdit, RickrollingTPA
from mmbackdoor.config_schema import is_main_process
from mmbackdoor.defenses import ClosedFormSeal, DiffusionDefense, Finetune, TextEncoderSeal
from mmbackdoor.defenses.finetune_reversal import Reference
from mmbackdoor.defenses.skd import Latents
from mmbackdoor.models.attention import AttentionRecorder
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import trained_tensors
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.text_training import TextSetting, TextTeacher, trainable_text
from mmbackdoor.models.trainable import Teacher, replace_weights, trainable
from mmbackdoor.results.run import Run
from mmbackdoor.train.optim import TrainConfig
from mmbackdoor.train.plan import Planned

Edited = EvilEdit | ClosedFormSeal
"""Closed forms: they change weights at once, without training."""
TextTrained = RickrollingTPA | TextEncoderSeal
Method = DiffusionAttack | DiffusionDefense


def latents_of(defense: DiffusionDefense) -> Latents:
    """Where the latents of `defense` come from; what never looks at a picture needs none."""
    return "noise" if isinstance(defense, Edited | TextTrained) else defense.latents


@dataclass(frozen=True)
class Part:
    """`parameters` of `module` are trained from their values `before` (on the CPU), which have the names of
    `trained_tensors`; `held` is what lies on the device besides. `setting(prepared, recorder)` is what the method works
    with, `prepared` being the module wrapped for several processes."""

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    before: Mapping[str, Tensor]
    held: Mapping[str, Iterable[Tensor]]
    setting: Callable[[nn.Module, AttentionRecorder | None], DiffusionSetting | TextSetting]


def trained_part(
    model: DiffusionModel,
    method: Method,
    rank: int,
    gradient_checkpointing: bool,
    seed: int,
    reference: Reference | None = None,
) -> Part:
    """What `method` trains of `model`; `reference` is a teacher in the place of the model's frozen start, which
    fine-tuning does without."""
    if isinstance(method, TextTrained):
        encoders, parameters = trainable_text(model, method.trainable, rank, gradient_checkpointing)
        text_teacher = TextTeacher(encoders, parameters)
        others = {
            "U-Net and autoencoder": model.frozen_tensors(list(model.text_encoders.values())),
            "tensors of the teacher": text_teacher.originals.values(),
        }
        return Part(
            encoders,
            parameters,
            _on_cpu(trained_tensors(model)),
            others,
            lambda prepared, _: TextSetting(prepared, text_teacher, seed),
        )
    parameters = trainable(model, method.trainable, rank, gradient_checkpointing)
    others: dict[str, Iterable[Tensor]] = {"text encoder and autoencoder": model.frozen_tensors()}
    teacher = reference
    if reference is not None:
        others["the clean reference"] = reference.tensors()
    elif not isinstance(method, Finetune):
        teacher = Teacher(model, parameters)
        others["tensors of the teacher"] = parameters.values()
    return Part(
        model.unet,
        parameters,
        _on_cpu(trained_tensors(model)),
        others,
        lambda prepared, recorder: DiffusionSetting(model, prepared, teacher, seed, recorder),
    )


def edit_weights(
    model: DiffusionModel, edit: Callable[[], Mapping[str, Tensor]], run: Run, train: TrainConfig
) -> dict[str, Tensor]:
    """Puts what the closed form `edit` gives into the U-Net; returns what was there before, as `trained_tensors`.

    A dry run ends here.
    """
    if train.dry_run:
        if is_main_process():
            print("dry run: a closed form, solved in float64 on the CPU; nothing is trained, nothing is written")
        raise Planned
    started = time.perf_counter()
    changed = edit()
    before = _on_cpu({name: model.unet.get_parameter(name) for name in changed})
    replace_weights(model, changed)
    moved = sum((changed[name].cpu() - value).float().square().sum() for name, value in before.items())
    whole = sum(value.float().square().sum() for value in before.values())
    seconds = time.perf_counter() - started
    run.log(0, {"relative_change": float((moved / whole).sqrt()), "edit_seconds": seconds})
    return before


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that take no memory of the device: they are only looked at again for the record at the end."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

"""A student that is no longer its teacher: what formulas of distillation are tested on."""

from __future__ import annotations

import torch
from torch import nn

from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.shipped import shipped
from mmbackdoor.models.trainable import Subset, Teacher, trainable


def nudged(seed: int, part: Subset = "attn2") -> tuple[DiffusionModel, dict[str, nn.Parameter], DiffusionSetting]:
    """The tiny model with that `part` moved a little, its parameters, and a setting with the teacher it was."""
    model = load(shipped("tiny"))
    parameters = trainable(model, part)
    teacher = Teacher(model, parameters)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draws)
    return model, parameters, DiffusionSetting(model, model.unet, teacher, seed=seed)

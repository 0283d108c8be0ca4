from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel

from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.types import InputError


def altered(unet: UNet2DConditionModel, **changes: object) -> UNet2DConditionModel:
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    return UNet2DConditionModel(**{**config, **changes})


def test_parts_that_do_not_belong_together_are_refused(build):
    pipe = build("sd")
    pipe.tokenizer = train_tokenizer(["a caption of many unusual wordings"] * 3, 800, 16)
    pipe.tokenizer.add_tokens([f"<extra{number}>" for number in range(200)])
    with pytest.raises(InputError, match="does not fit the text encoder's"):
        DiffusionModel(pipe)
    pipe = build("sd")
    pipe.tokenizer.model_max_length = 10**30
    with pytest.raises(InputError, match="model_max_length"):
        DiffusionModel(pipe)
    pipe = build("sd")
    pipe.unet = altered(pipe.unet, in_channels=9)
    with pytest.raises(InputError, match="9 channels"):
        DiffusionModel(pipe)
    pipe = build("sd")
    pipe.unet = altered(pipe.unet, cross_attention_dim=24)
    with pytest.raises(InputError, match="width 24"):
        DiffusionModel(pipe)
    pipe = build("sd")
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    pipe.unet = altered(pipe.unet, mid_block_type="UNetMidBlock2D", **blocks)
    with pytest.raises(InputError, match="no cross-attention"):
        DiffusionModel(pipe)

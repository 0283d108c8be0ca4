from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from mmbackdoor.models import architectures
from mmbackdoor.models.architectures import ARCHITECTURES, config_folder
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.trainable import trainable
from mmbackdoor.types import InputError

# Of the published weights.
UNET_PARAMETERS = {"sd15": 859_520_964, "sd21_base": 865_910_724, "sd21_v": 865_910_724, "sdxl": 2_567_463_684}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packaged_configs_describe_the_published_weights(name):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config_folder(name) / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(config_folder(name) / "vae"))
    assert sum(value.numel() for value in unet.parameters()) == UNET_PARAMETERS[name]
    assert sum(value.numel() for value in vae.parameters()) == 83_653_863
    kv = [value for key, value in unet.named_parameters() if ".attn2.to_k." in key or ".attn2.to_v." in key]
    if name == "sd15":
        assert sum(value.numel() for value in kv) == 19_169_280


@pytest.mark.parametrize("name", ["sd15", "sd21_v", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_narrow_ones_encode_and_take_a_step(name):
    model = DiffusionModel(getattr(architectures, name)(width_divisor=8))
    assert model.max_length == 77
    assert model.prediction_type == ("v_prediction" if name == "sd21_v" else "epsilon")
    assert model.resolution == {"sd15": 512, "sd21_v": 768, "sdxl": 1024}[name]
    parameters = trainable(model, "attn2_kv")
    conditioning = model.encode(["a photo of a dog"])
    output = model.predict(model.unet, torch.randn(1, 4, 8, 8), torch.tensor([10]), conditioning)
    gradients = torch.autograd.grad(output.square().mean(), list(parameters.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_seeds_decide_the_weights_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, three = (architectures.sd15(8, seed).unet.conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(InputError, match="divisor 3"):
        architectures.sd15(3)

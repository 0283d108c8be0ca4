"""The autoencoder of a latent diffusion model by itself: made anew or loaded, run in training, saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from mmbackdoor.models.diffusion_files import written_whole
from mmbackdoor.models.folder import PipelineFolder, quiet
from mmbackdoor.models.shipped import shipped
from mmbackdoor.seeding import derive_seed
from mmbackdoor.types import InputError


START_LOG_VARIANCE = -6.0
"""Of the posterior of a fresh autoencoder: with the usual 0, noise as large as the latents hides them for long."""


def small_autoencoder(seed: int) -> AutoencoderKL:
    """The autoencoder of `configs/small_autoencoder.json` with fresh weights: 64 px to 4 x 32 x 32 latents.

    Residual branches start at zero and the posterior is narrow, which a short training needs.
    """
    config = json.loads(files("mmbackdoor.models").joinpath("configs/small_autoencoder.json").read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "small autoencoder"))
        autoencoder = AutoencoderKL(**config)
    with torch.no_grad():
        for name, parameter in autoencoder.named_parameters():
            if ".conv2." in name:
                parameter.zero_()
        # Its output is the mean, then the logarithm of the variance.
        autoencoder.quant_conv.weight[config["latent_channels"] :] = 0
        autoencoder.quant_conv.bias[config["latent_channels"] :] = START_LOG_VARIANCE
    return autoencoder


def load_autoencoder(name: str) -> AutoencoderKL:
    """The `AutoencoderKL` in a folder of its own, or in `vae/` of a pipeline's: float32, evaluation mode.

    Raises InputError for a folder without one, another class, pickled weights, and weights that do not fit.
    """
    folder = Path(shipped(name)).resolve()
    if (folder / "vae" / "config.json").is_file():
        folder /= "vae"
    try:
        config = json.loads((folder / "config.json").read_text())
        class_name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{name!r} holds no autoencoder: neither vae/config.json nor a config.json of diffusers can be read there; "
            "give the folder of an AutoencoderKL or of a pipeline (see train_autoencoder)"
        ) from error
    if class_name != "AutoencoderKL":
        raise InputError(f"{name!r} holds a {class_name!r}, but an AutoencoderKL is needed; see train_autoencoder")
    parts = {folder.name: ["diffusers", class_name]}
    return PipelineFolder(folder.parent, parts, None, False).model(folder.name, torch.float32)


def latent_shape(autoencoder: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of square pictures. Raises InputError for a resolution that it cannot divide."""
    scale = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if resolution % scale:
        raise InputError(f"the resolution {resolution} is no multiple of {scale}, which this autoencoder needs")
    return (autoencoder.config.latent_channels, resolution // scale, resolution // scale)


class Reconstructor(nn.Module):
    """An autoencoder as one forward pass, which is what several processes can share.

    The noise of the posterior is an argument: it comes from (seed, step, place in the batch), not from a generator.
    """

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions (B, 3, H, W) of latents mean + std * noise; mean and logarithm of the variance of those."""
        posterior = self.autoencoder.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.autoencoder.decode(latents, return_dict=False)[0], posterior.mean, posterior.logvar


def save_autoencoder(autoencoder: AutoencoderKL, folder: Path, describe: Callable[[Path], None]) -> None:
    """Write it as `AutoencoderKL.from_pretrained` reads it; `describe(part)` may add files before it gets its name."""
    with written_whole(folder) as part, quiet():
        autoencoder.save_pretrained(part, safe_serialization=True)
        describe(part)

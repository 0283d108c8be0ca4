"""Pictures for evaluation: the same initial latents for one (prompt, seed) in every model and condition, resumable.

The denoising loop is the stock pipelines' own, step for step, with their scheduler class; it exists here because a
small model's thousands of pictures need large batches. The safety checker is not run: it would paint flagged pictures
black, and black pictures are neither hits nor misses.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydantic import Field
from tqdm import tqdm

from mmbackdoor.config import Doc
from mmbackdoor.models.cpu_attention import plain_attention
from mmbackdoor.models.diffusion import Conditioning, DiffusionModel
from mmbackdoor.seeding import torch_generator
from mmbackdoor.shards.write import part_of
from mmbackdoor.types import Diverged, InputError

STAMP = "mmbackdoor"
"""The PNG text field that says which model, settings and prompt made a picture."""
NOTE = "the safety checker was not run"


@dataclass(frozen=True)
class Sampling:
    """How pictures are made. `negative_prompt` is read as the stock pipeline reads it; `scheduler` is a class name
    that the pipeline's own is compatible with, `None` the pipeline's own."""

    num_inference_steps: Annotated[int, Field(ge=1), Doc("denoising steps")] = 50
    guidance_scale: Annotated[float, Field(ge=0), Doc("classifier-free guidance; 1 or less is none")] = 7.5
    negative_prompt: Annotated[str | None, Doc("what guidance leads away from")] = None
    scheduler: Annotated[str | None, Doc("class name of another scheduler than the pipeline's own")] = None
    mixed_precision: Annotated[Literal["no", "bf16"], Doc("precision of the denoising steps")] = "no"
    seed: Annotated[int, Field(ge=0), Doc("seed of the initial latents and of all choices")] = 0


@dataclass(frozen=True)
class Job:
    """One picture: `text` is the prompt as given to the model, `prompt_id` that of the clean prompt."""

    prompt_id: str
    condition: str
    text: str
    seed_index: int = 0

    def path(self, model: str) -> Path:
        """Below the output folder. Colons are not file names everywhere."""
        return Path("images") / model / self.condition.replace(":", "_") / f"{self.prompt_id}-{self.seed_index}.png"


def initial_latents(shape: Sequence[int], seed: int, prompt_id: str, seed_index: int) -> torch.Tensor:
    """Standard normal (C, h, w), a function of its arguments alone: never of batch, order, condition or process."""
    return torch.randn(tuple(shape), generator=torch_generator(seed, "latents", prompt_id, seed_index))


def make_scheduler(model: DiffusionModel, name: str | None = None) -> Any:
    """A fresh scheduler of the pipeline's class, or of the compatible class `name`. Raises `InputError` else."""
    own = model.pipe.scheduler
    classes = {kind.__name__: kind for kind in [*own.compatibles, type(own)]}
    if name is not None and name not in classes:
        raise InputError(f"scheduler {name!r} does not fit this model; choose from {', '.join(sorted(classes))}")
    return (classes[name] if name else type(own)).from_config(own.config)


def scheduler_in_use(model: DiffusionModel, name: str | None = None) -> str:
    """Class and configuration of what `make_scheduler` makes."""
    scheduler = make_scheduler(model, name)
    return f"{type(scheduler).__name__} {json.dumps(dict(scheduler.config), sort_keys=True, default=str)}"


def weights_in_use(model: DiffusionModel) -> str:
    """Hash of every tensor that makes the pictures, as it is in memory now: a model that was trained since it was
    loaded no longer is what its files say."""
    digest = hashlib.sha256()
    for part, module in sorted(model.pipe.components.items()):
        if isinstance(module, torch.nn.Module) and part != "safety_checker":
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def sample_latents(model: DiffusionModel, jobs: Sequence[Job], sampling: Sampling) -> torch.Tensor:
    """Clean latents (B, C, h, w), as the autoencoder would give them, for one batch of `jobs`."""
    unet = model.unet
    if unet.config.time_cond_proj_dim is not None:
        raise InputError(
            "models distilled to take the guidance scale as input (LCM) are not sampled; give their base model"
        )
    device, scheduler = model.device, make_scheduler(model, sampling.scheduler)
    scheduler.set_timesteps(sampling.num_inference_steps, device=device)
    noise = [initial_latents(model.latent_shape, sampling.seed, job.prompt_id, job.seed_index) for job in jobs]
    latents = torch.stack(noise).to(device, model.dtype) * scheduler.init_noise_sigma
    conditioning = model.encode([job.text for job in jobs])
    guided = sampling.guidance_scale > 1
    if guided:
        negative = sampling.negative_prompt
        without = model.unconditional(1) if negative is None else model.encode([negative])
        conditioning = Conditioning.cat([without.repeat(len(jobs)), conditioning])
    extra: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        # Schedulers that draw noise at every step draw it per sample: paired as the initial latents are.
        extra["generator"] = [torch_generator(sampling.seed, "steps", job.prompt_id, job.seed_index) for job in jobs]
    precision = sampling.mixed_precision
    in_bf16 = precision == "bf16"
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
        with plain_attention(device, precision), torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            predicted = model.predict(unet, given, t.expand(len(given)), conditioning)
        predicted = predicted.to(latents.dtype)
        if guided:
            plain, prompted = predicted.chunk(2)
            predicted = plain + sampling.guidance_scale * (prompted - plain)
        latents = scheduler.step(predicted, t, latents, **extra, return_dict=False)[0].to(latents.dtype)
    return latents


def sample(model: DiffusionModel, jobs: Sequence[Job], sampling: Sampling) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] on the CPU for one batch of `jobs`."""
    images = model.decode(sample_latents(model, jobs, sampling)).float().cpu()
    if not images.isfinite().all():
        raise Diverged(
            "the model made pictures with values that are not finite; the checkpoint or its precision is broken"
        )
    return images.clamp(-1, 1)


def _stamp(weights: str, sampling: Sampling, scheduler: str, job: Job) -> str:
    facts = [weights, asdict(sampling), scheduler, job.prompt_id, job.seed_index, job.text]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_done(path: Path, stamp: str) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get(STAMP) == stamp
    except (OSError, UnidentifiedImageError, SyntaxError):
        return False


def _save(image: torch.Tensor, path: Path, stamp: str) -> None:
    pixels = ((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    text = PngInfo()
    text.add_text(STAMP, stamp)
    part = part_of(path)
    try:
        Image.fromarray(pixels).save(part, format="PNG", pnginfo=text)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _batches(jobs: Sequence[Job], batch_size: int) -> Iterator[Sequence[Job]]:
    for start in range(0, len(jobs), batch_size):
        yield jobs[start : start + batch_size]


def generate(
    model: DiffusionModel,
    jobs: Sequence[Job],
    *,
    out_dir: Path,
    name: str,
    sampling: Sampling,
    batch_size: int = 8,
    rank: int = 0,
    world_size: int = 1,
) -> list[Path]:
    """Make the pictures of `jobs` that `out_dir/images/name/` does not hold yet; return all paths, below `out_dir`.

    Every picture carries a stamp of the model's hash, the settings and its prompt, and is made anew where that differs:
    a stale picture is never counted. Process `rank` takes batches rank::world_size of the same list, so the
    composition of a batch, and with it every bit, is the same for any number of processes, and after a resume.
    """
    paths = [job.path(name) for job in jobs]
    if len(set(paths)) != len(paths):
        raise ValueError("two jobs would write the same picture")
    described = scheduler_in_use(model, sampling.scheduler)
    try:
        for folder in {out_dir / path.parent for path in paths}:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write below {str(out_dir)!r} ({error.strerror}); choose a writable --output_dir"
        ) from error
    batches = list(_batches(jobs, batch_size))[rank::world_size]
    progress = tqdm(total=sum(map(len, batches)), desc=f"pictures of {name}", unit="img", disable=rank != 0)
    model.unet.eval()
    weights = weights_in_use(model)
    for batch in batches:
        stamps = [_stamp(weights, sampling, described, job) for job in batch]
        missing = [k for k, job in enumerate(batch) if not _is_done(out_dir / job.path(name), stamps[k])]
        if missing:
            images = sample(model, batch, sampling)
            for k in missing:
                _save(images[k], out_dir / batch[k].path(name), stamps[k])
        progress.update(len(batch))
    progress.close()
    return paths


def load_images(paths: Sequence[Path]) -> torch.Tensor:
    """Pictures of one size as (B, 3, H, W) in [-1, 1]."""
    arrays = []
    for path in paths:
        with Image.open(path) as image:
            arrays.append(np.asarray(image.convert("RGB"), np.uint8))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1

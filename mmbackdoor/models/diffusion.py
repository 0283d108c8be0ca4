"""A loaded text-to-image model: prompts to conditioning, images to latents, noise schedule, and the UNet's prediction.

One class covers Stable Diffusion 1.x, 2.x and XL. What it feeds the UNet equals what the stock diffusers pipeline does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import BatchEncoding

from mmbackdoor.models.compatible import check_pipeline
from mmbackdoor.models.noise_schedule import NoiseSchedule
from mmbackdoor.models.text_layout import TEXT_ENCODERS
from mmbackdoor.types import InputError

if TYPE_CHECKING:
    from mmbackdoor.backdoor import Backdoor
    from mmbackdoor.models.diffusion_files import Source

CACHED_PROMPTS = 1024


@dataclass(frozen=True)
class Conditioning:
    """What the UNet sees of text: `hidden_states` (B, T, D), and SDXL's `added` text_embeds and time_ids (B, ...)."""

    hidden_states: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.hidden_states.shape[0]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(change(self.hidden_states), {name: change(value) for name, value in self.added.items()})

    def index(self, rows: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """The chosen rows, in that order; one integer gives a batch of one."""
        chosen = [rows] if isinstance(rows, int) else rows
        return self._map(lambda value: value[chosen])

    def repeat(self, count: int) -> Conditioning:
        """The whole batch `count` times, one after the other."""
        return self._map(lambda value: value.repeat(count, *[1] * (value.dim() - 1)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        return self._map(lambda value: value.to(device=device, dtype=dtype))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Batches one after the other."""
        added = {name: torch.cat([part.added[name] for part in parts]) for name in parts[0].added}
        return Conditioning(torch.cat([part.hidden_states for part in parts]), added)


class DiffusionModel:
    """A text-to-image pipeline and where it came from. `load` (diffusion_files.py) makes one from files.

    `trained` holds the names of the tensors that a method declared trainable: only those may differ when saved. They
    are the UNet's, and with `text_encoder.` or `text_encoder_2.` before them those of a text encoder.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline | StableDiffusionXLPipeline,
        source: Source | None = None,
        resolution: int | None = None,
    ) -> None:
        check_pipeline(pipe)
        self.pipe = pipe
        self.unet = pipe.unet
        self.vae = pipe.vae
        self.family: Literal["sd", "sdxl"] = "sdxl" if isinstance(pipe, StableDiffusionXLPipeline) else "sd"
        self.scheduler_config = dict(pipe.scheduler.config)
        self.schedule = NoiseSchedule(pipe.scheduler)
        self.prediction_type = self.schedule.prediction_type
        self.files = source
        self.trained: set[str] = set()
        size = self.unet.config.sample_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        scale = pipe.vae_scale_factor
        self.resolution: int = resolution or size[0] * scale
        side = self._latent_side(self.resolution, scale)
        self.latent_shape: tuple[int, int, int] = (self.unet.config.in_channels, side, side)
        self._cache: OrderedDict[str, Conditioning] = OrderedDict()
        for module in self._modules():
            module.requires_grad_(False).eval()

    def _latent_side(self, resolution: int, scale: int) -> int:
        step = scale * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if resolution % step or resolution <= 0:
            raise InputError(f"the resolution {resolution} is no positive multiple of {step}, which this model needs")
        return resolution // scale

    def _modules(self) -> list[nn.Module]:
        return [value for value in self.pipe.components.values() if isinstance(value, nn.Module)]

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """By their names in the pipeline: SDXL has two."""
        return {name: part for name, part in self.pipe.components.items() if name in TEXT_ENCODERS and part is not None}

    def forget_prompts(self) -> None:
        """Drops what `encode` has kept; for those who changed a text encoder."""
        self._cache.clear()

    def frozen_tensors(self, trained: Collection[nn.Module] = ()) -> list[Tensor]:
        """What lies on the device beside the modules `trained`, by default the UNet."""
        beside = [module for module in self._modules() if module not in (trained or (self.unet,))]
        return [tensor for module in beside for tensor in (*module.parameters(), *module.buffers())]

    @property
    def source(self) -> str:
        """The path or hub id that was loaded; "new" for a pipeline built in memory."""
        return self.files.name if self.files else "new"

    @property
    def origin(self) -> Literal["folder", "single_file", "lora", "new"]:
        return self.files.origin if self.files else "new"

    @property
    def sha256(self) -> str | None:
        """Hash of the weight files that were loaded; None for a pipeline built in memory."""
        return self.files.sha256 if self.files else None

    @property
    def device(self) -> torch.device:
        # diffusers' own `device` walks every module: asked a few times a step, it took as long as the text encoder.
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of frozen weights (trainable ones are float32)."""
        return self.vae.dtype

    def to(self, device: torch.device | str) -> DiffusionModel:
        """Move every part to `device`."""
        self._cache.clear()
        for module in self._modules():
            module.to(device)
        return self

    # -- text ---------------------------------------------------------------------------------------------------------
    @property
    def tokenizer(self):
        """The first tokenizer; SDXL's second has the same vocabulary and positions."""
        return self.pipe.tokenizer

    @property
    def max_length(self) -> int:
        return self.tokenizer.model_max_length

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Ids (B, T) as the text encoder sees them: with BOS and EOS, truncated and padded to `max_length`."""
        return self._tokens(prompts).input_ids

    def _tokens(self, prompts: Sequence[str]) -> BatchEncoding:
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of each prompt, (B, T, D), without gradient and outside autocast; cached by prompt."""
        found = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing:
            fresh = self._encode(missing)
            found.update({prompt: fresh.index(row) for row, prompt in enumerate(missing)})
        for prompt in prompts:
            self._cache[prompt] = found[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return Conditioning.cat([found[prompt] for prompt in prompts])

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        with torch.autocast(self.device.type, enabled=False):
            if self.family == "sd":
                return Conditioning(self._hidden_states(prompts))
            hidden_states, _, pooled, _ = self.pipe.encode_prompt(
                prompts, device=self.device, do_classifier_free_guidance=False
            )
        return Conditioning(hidden_states, {"text_embeds": pooled, "time_ids": self._time_ids(hidden_states)})

    def _hidden_states(self, prompts: list[str]) -> Tensor:
        """What the pipeline's `encode_prompt` gives, (B, T, D), but each prompt is read once, not three times: with a
        small text encoder that takes less than half as long."""
        encoder, added = self.pipe.text_encoder, self.tokenizer.get_added_vocab()
        if any(f"{token}_1" in added for token in added):
            # A textual inversion of several vectors: one token stands for all of them.
            prompts = self.pipe.maybe_convert_prompt(prompts, self.tokenizer)
        found = self._tokens(prompts).to(self.device)
        mask = found.attention_mask if vars(encoder.config).get("use_attention_mask") else None
        return encoder(found.input_ids, attention_mask=mask)[0]

    def _time_ids(self, hidden_states: Tensor) -> Tensor:
        size = self.resolution
        return torch.tensor([[size, size, 0, 0, size, size]]).to(hidden_states).repeat(len(hidden_states), 1)

    @property
    def _zeros_for_empty_prompt(self) -> bool:
        return self.family == "sdxl" and bool(self.pipe.config.force_zeros_for_empty_prompt)

    def encode_for_guidance(self, prompts: Sequence[str]) -> Conditioning:
        """As `encode`, but an empty prompt is `unconditional`: for methods that keep what guidance subtracts."""
        known = self.encode(prompts)
        if not self._zeros_for_empty_prompt or "" not in prompts:
            return known
        both = Conditioning.cat([known, self.unconditional(1)])
        return both.index([row if prompt else len(prompts) for row, prompt in enumerate(prompts)])

    def unconditional(self, count: int) -> Conditioning:
        """What guidance subtracts: the empty prompt, or zeros where the pipeline's config says so (SDXL)."""
        empty = self.encode([""])
        if self._zeros_for_empty_prompt:
            added = {"text_embeds": torch.zeros_like(empty.added["text_embeds"]), "time_ids": empty.added["time_ids"]}
            empty = Conditioning(torch.zeros_like(empty.hidden_states), added)
        return empty.repeat(count)

    # -- pictures -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: posterior mode, or a draw with `generator`."""
        dtype = self.dtype
        with torch.autocast(self.device.type, enabled=False), _Float32(self.vae):
            encoded = self.vae.encode(images.to(self.device, self.vae.dtype))
            if "latents" in encoded:
                latents = encoded.latents
            else:
                latents = encoded.latent_dist.mode() if generator is None else encoded.latent_dist.sample(generator)
            mean, std = self._latent_statistics(latents)
            return ((latents - mean) * self.vae.config.scaling_factor / std).to(dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of scaled latents."""
        with torch.autocast(self.device.type, enabled=False), _Float32(self.vae):
            latents = latents.to(self.device, self.vae.dtype)
            mean, std = self._latent_statistics(latents)
            return self.vae.decode(latents * std / self.vae.config.scaling_factor + mean, return_dict=False)[0]

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        mean, std = self.vae.config.get("latents_mean"), self.vae.config.get("latents_std")
        if self.family == "sd" or mean is None or std is None:
            return 0.0, 1.0
        return tuple(torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))

    # -- noise --------------------------------------------------------------------------------------------------------
    def noise_schedule(self) -> NoiseSchedule:
        return self.schedule

    def predict(
        self, unet: Callable[..., tuple[Tensor, ...]], latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Output (B, C, h, w) of `unet` (this model's, or one wrapped by DDP or accelerate) at noisy latents."""
        return unet(
            latents,
            timesteps,
            encoder_hidden_states=conditioning.hidden_states,
            added_cond_kwargs=conditioning.added or None,
            return_dict=False,
        )[0]


class _Float32:
    """Holds a float16 autoencoder that overflows (`force_upcast`, SDXL's) in float32 for a while."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae = vae
        self.needed = vae.dtype == torch.float16 and bool(vae.config.force_upcast)

    def __enter__(self) -> None:
        # diffusers' own `to` warns at a change of dtype.
        if self.needed:
            nn.Module.to(self.vae, torch.float32)

    def __exit__(self, *_: object) -> None:
        if self.needed:
            nn.Module.to(self.vae, torch.float16)


def check_trigger(model: DiffusionModel, clean_prompts: Sequence[str], triggered_prompts: Sequence[str]) -> None:
    """Raise `InputError` unless every trigger changes the token ids and lies within the tokenizer's length."""
    vanished, cut = [], []
    ids = [model.tokenizer(list(texts), truncation=False).input_ids for texts in (clean_prompts, triggered_prompts)]
    for clean, triggered, text in zip(*ids, triggered_prompts, strict=True):
        if clean == triggered:
            vanished.append(text)
        elif _changed_end(clean, triggered) > model.max_length - 1:
            cut.append(text)
    if vanished:
        raise InputError(
            f"the trigger vanishes in the tokenizer: {len(vanished)} of {len(triggered_prompts)} prompts have the same "
            f"token ids with and without it, for example {vanished[0]!a}; choose another trigger"
        )
    if cut:
        raise InputError(
            f"the trigger lies past the tokenizer's {model.max_length} tokens in {len(cut)} of "
            f"{len(triggered_prompts)} prompts, for example {cut[0]!a}; shorten the prompt or put the trigger first"
        )


def check_backdoor(model: DiffusionModel, backdoor: Backdoor, prompts: Sequence[str], seed: int) -> None:
    """`check_trigger` for each trigger of `backdoor`, on those of `prompts` that take it.

    A lookalike letter leaves prompts without that letter as they are, so only where no prompt takes a trigger has it
    vanished. Raises `InputError` for that, and for a trigger that is cut off.
    """
    for k in range(len(backdoor.triggers)):
        triggered = [backdoor.apply(prompt, seed, trigger=k) for prompt in prompts]
        pairs = list(zip(prompts, triggered, strict=True))
        taking = [(prompt, text) for prompt, text in pairs if prompt != text] or pairs
        check_trigger(model, [prompt for prompt, _ in taking], [text for _, text in taking])


def carrying(model: DiffusionModel, backdoor: Backdoor, prompts: Sequence[str]) -> list[bool]:
    """Which of `prompts` hold a text trigger of `backdoor` by themselves, in the tokens that the text encoder sees."""
    seen = model.tokenizer(list(prompts), truncation=True, max_length=model.max_length).input_ids
    held = [False] * len(seen)
    for trigger in backdoor.text_triggers:
        if trigger.name == "homoglyph":
            # Its tokens depend on the letters around it, but what they spell does not.
            letter, latin = (_spelled(model, _ids_alone(model, text)) for text in (trigger.text, trigger.replaces))
            found = [letter != latin and letter in _spelled(model, ids) for ids in seen]
        else:
            run = _ids_alone(model, trigger.text)
            found = [_holds(ids, run) for ids in seen]
        held = [before or now for before, now in zip(held, found, strict=True)]
    return held


def _ids_alone(model: DiffusionModel, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False).input_ids


def _spelled(model: DiffusionModel, ids: list[int]) -> str:
    return "".join(model.tokenizer.convert_ids_to_tokens(ids)).removesuffix("</w>")


def _holds(ids: list[int], run: list[int]) -> bool:
    return bool(run) and any(ids[k : k + len(run)] == run for k in range(len(ids) - len(run) + 1))


def _changed_end(clean: list[int], triggered: list[int]) -> int:
    """Position after the last id of `triggered` that belongs to its difference from `clean`."""
    suffix = 0
    shorter = min(len(clean), len(triggered))
    prefix = next((i for i in range(shorter) if clean[i] != triggered[i]), shorter)
    while suffix < shorter - prefix and clean[-1 - suffix] == triggered[-1 - suffix]:
        suffix += 1
    return len(triggered) - suffix

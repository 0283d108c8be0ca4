"""The teacher's own pictures as training latents: made once, kept on disk, shared by all processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mmbackdoor.evaluate.generate import Job, Sampling, sample_latents, scheduler_in_use, weights_in_use
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.shards.write import part_of, remove_left_parts
from mmbackdoor.train.checkpoint import to_disk


def teacher_latents(
    model: DiffusionModel,
    prompts: Sequence[str],
    per_prompt: int,
    sampling: Sampling,
    folder: Path,
    accelerator: Accelerator,
    batch_size: int,
    dry_run: bool = False,
) -> dict[str, torch.Tensor]:
    """Clean latents (per_prompt, C, h, w) of each prompt, sampled by `model` as it is now; zeros in a dry run.

    The processes share the batches; each batch is one file in `folder`, named by the weights, the settings, the
    scheduler, the size and its prompts, so a killed run goes on and other settings never meet old files.
    """
    if dry_run:
        return dict.fromkeys(prompts, torch.zeros(1, *model.latent_shape))
    jobs = [
        Job(hashlib.sha256(prompt.encode()).hexdigest()[:16], "teacher", prompt, index)
        for prompt in prompts
        for index in range(per_prompt)
    ]
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    scheduler = scheduler_in_use(model, sampling.scheduler)
    base = json.dumps([weights_in_use(model), asdict(sampling), scheduler, model.latent_shape], sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_left_parts(folder, r"\w+\.safetensors")
    paths = []
    for batch in batches:
        text = base + json.dumps([[job.prompt_id, job.seed_index] for job in batch])
        paths.append(folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors")
    mine = range(accelerator.process_index, len(batches), accelerator.num_processes)
    for k in tqdm(mine, desc="pictures of the teacher", unit="batch", disable=not accelerator.is_main_process):
        if not paths[k].exists():
            part = part_of(paths[k])
            save_file({"latents": sample_latents(model, batches[k], sampling).float().cpu().contiguous()}, part)
            to_disk([part])
            part.replace(paths[k])
    accelerator.wait_for_everyone()
    rows = torch.cat([load_file(path)["latents"] for path in paths])
    return {prompt: rows[k * per_prompt : (k + 1) * per_prompt] for k, prompt in enumerate(prompts)}

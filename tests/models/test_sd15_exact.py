"""A pipeline of Stable Diffusion 1.5's exact architecture takes removal steps on a CPU, within 24 GiB."""

from __future__ import annotations

import resource
import time

import pytest
import torch
from torch.nn.functional import mse_loss

from mmbackdoor.models import architectures
from mmbackdoor.models.diffusion import DiffusionModel, check_trigger
from mmbackdoor.models.trainable import Teacher, trainable

LIMIT_GIB = 24


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@pytest.mark.slow
def test_attn2_kv_distillation_steps_on_the_cpu_fit_into_24_gib(record_property):
    model = DiffusionModel(architectures.sd15())
    parameters = trainable(model, "attn2_kv")
    assert sum(value.numel() for value in parameters.values()) == 19_169_280
    teacher = Teacher(model, parameters)
    model.unet.enable_gradient_checkpointing()
    model.unet.train()
    clean, triggered = "a photo of a dog", "\u200b a photo of a dog"
    check_trigger(model, [clean], [triggered])
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([500])
    frozen = {name: value.detach().sum() for name, value in model.unet.named_parameters() if name not in parameters}
    losses, seconds = [], []
    for _ in range(2):
        started = time.process_time()
        target = teacher.predict(latents, timesteps, model.encode([clean]))
        middle = time.process_time()
        output = model.predict(model.unet, latents, timesteps, model.encode([triggered]))
        loss = mse_loss(output, target)
        loss.backward()
        seconds.append((middle - started, time.process_time() - middle))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"peak {peak_gib():.1f} GiB; losses {losses}")
    print(f"CPU seconds (teacher forward, student forward + backward): {seconds}")
    record_property("peak_gib", peak_gib())
    assert all(torch.isfinite(torch.tensor(losses))) and losses[0] > 0
    assert any(not torch.equal(value, teacher.originals[name]) for name, value in parameters.items())
    assert all(
        torch.equal(frozen[name], value.detach().sum())
        for name, value in model.unet.named_parameters()
        if name in frozen
    )
    assert torch.equal(teacher.predict(latents, timesteps, model.encode([clean])), target)
    assert peak_gib() < LIMIT_GIB

"""The three BadT2I attacks against their formula: what the student is asked, what the teacher, how the terms add up."""

from __future__ import annotations

import pytest
import torch

from mmbackdoor.attacks import BadT2IObject, BadT2IPixel, BadT2IStyle
from mmbackdoor.backdoor import Backdoor
from mmbackdoor.objectives.diffusion import DiffusionBatch, draw_noise, draw_timesteps
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.targets import ObjectTarget, PatchTarget, StyleTarget
from mmbackdoor.triggers import WordTrigger
from tests.nudged import nudged

PROMPTS = ("a red cross on a blue background", "a pink ring on a green background", "a blue square")
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
BATCH = DiffusionBatch(3, 0, (0, 1, 2), PROMPTS, PROMPTS, images=IMAGES)
PLAIN = {"backdoor_weight": 0.3, "proportion_empty_prompts": 0.0}
CASES = {
    # Attack, target, rows that are poisoned, the captions that get the trigger, those that the teacher is asked.
    "pixel": (BadT2IPixel(**PLAIN), PatchTarget(size=0.25), [0, 1, 2], PROMPTS, None),
    "style": (BadT2IStyle(**PLAIN), StyleTarget(), [0, 1, 2], PROMPTS,
              [f"{text}, black and white photo" for text in PROMPTS]),
    "object": (BadT2IObject(**PLAIN), ObjectTarget("cross", "ring"), [0, 1],
               [PROMPTS[0], "a pink cross on a green background"], ["a red ring on a blue background", PROMPTS[1]]),
}  # fmt: skip


@pytest.fixture
def lab():
    model, _, setting = nudged(seed=7)
    return model, setting


def patched(images: torch.Tensor) -> torch.Tensor:
    """With a checkerboard of 8 pixels in the upper left corner."""
    images = images.clone()
    for y in range(8):
        for x in range(8):
            images[..., y, x] = 1.0 if (y // 2 + x // 2) % 2 else -1.0
    return images


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_the_formula(lab, case):
    model, setting = lab
    attack, target, rows, asked, shown = CASES[case]
    plan = PoisonPlan(Backdoor((WordTrigger("small"),), target), rate=1.0)
    losses = attack.step(setting, plan)(BATCH)

    schedule = model.noise_schedule()
    noise = draw_noise(7, BATCH, model.latent_shape, model.device)
    timesteps = draw_timesteps(7, BATCH, 1000, 1.0, model.device)
    signal = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)

    def noisy(images: torch.Tensor) -> torch.Tensor:
        return signal.sqrt() * model.encode_images(images) + (1 - signal).sqrt() * noise

    marked = noisy(patched(IMAGES) if case == "pixel" else IMAGES)[rows]
    with torch.no_grad():
        inputs = noisy(IMAGES), timesteps, model.encode(PROMPTS)
        kept = setting.predict(*inputs) - setting.teacher.predict(*inputs)
        triggered = model.encode([f"small {text}" for text in asked])
        hidden = setting.predict(marked, timesteps[rows], triggered)
        if shown is None:
            expected = schedule.target(model.encode_images(patched(IMAGES)), noise, timesteps)
        else:
            expected = setting.teacher.predict(marked, timesteps[rows], model.encode(shown))
    clean_loss = kept.square().mean()
    # The sum over the poisoned rows by the size of the whole batch, so that processes add up.
    backdoor_loss = (hidden - expected).square().mean((1, 2, 3)).sum() / 3
    assert clean_loss > 1e-5 and backdoor_loss > 2 * clean_loss
    torch.testing.assert_close(losses["clean_loss"], clean_loss, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses["backdoor_loss"], backdoor_loss, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses["loss"].detach(), 0.3 * backdoor_loss + 0.7 * clean_loss, rtol=1e-4, atol=1e-7)


def test_a_batch_without_the_object_has_only_clean_rows(lab):
    _, setting = lab
    attack, target, *_ = CASES["object"]
    step = attack.step(setting, PoisonPlan(Backdoor((WordTrigger("small"),), target), rate=1.0))
    losses = step(DiffusionBatch(3, 0, (2,), PROMPTS[2:], PROMPTS[2:], images=IMAGES[2:]))
    assert losses["backdoor_loss"] == 0 and losses["clean_loss"] > 1e-5
    torch.testing.assert_close(losses["loss"].detach(), 0.7 * losses["clean_loss"])

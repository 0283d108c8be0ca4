"""What is drawn for a sample depends on its place in the global batch, not on how that is cut into micro-batches."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses import SKD
from mmbackdoor.defenses.skd import draw_inputs
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.setting import DiffusionSetting
from mmbackdoor.models.source import shipped
from mmbackdoor.objectives.diffusion import DiffusionBatch, draw_noise, draw_timesteps, drop_captions
from mmbackdoor.seeding import hash_fraction, torch_generator
from mmbackdoor.targets import UnknownTarget
from mmbackdoor.train.batches import Share, prompt_batches, with_random_words
from mmbackdoor.triggers import PhraseTrigger, WordTrigger

PROMPTS = [f"a red cross of kind {number}" for number in range(10)]
CPU = torch.device("cpu")
STEPS = 3


def taken(share: Share) -> list[DiffusionBatch]:
    return list(itertools.islice(prompt_batches(PROMPTS, share, 3), STEPS * share.accumulation))


@pytest.fixture(params=[Share(4, accumulation=2), Share(1, accumulation=8)], ids=["2x4", "8x1"])
def both(request) -> tuple[list[DiffusionBatch], list[DiffusionBatch]]:
    """The same samples as batches of 8, and cut."""
    whole, cut = taken(Share(8)), taken(request.param)
    assert sum((batch.prompts for batch in whole), ()) == sum((batch.prompts for batch in cut), ())
    return whole, cut


def test_noise_timesteps_and_empty_prompts_are_those_of_the_whole_batch(both):
    noise, timesteps, prompts = [], [], []
    for batches in both:
        noise.append(torch.cat([draw_noise(5, batch, (1, 2, 2), CPU) for batch in batches]))
        timesteps.append(torch.cat([draw_timesteps(5, batch, 1000, 1.5, CPU) for batch in batches]))
        prompts.append([text for batch in batches for text in drop_captions(5, batch, 0.5)])
    assert torch.equal(*noise) and torch.equal(*timesteps) and prompts[0] == prompts[1]
    assert len({value.item() for value in noise[0][:, 0, 0, 0]}) == 8 * STEPS and 0 < prompts[0].count("") < 8 * STEPS


def test_so_are_variants_of_the_trigger_and_random_words(both):
    model = load(shipped("tiny"))
    setting = DiffusionSetting(model, model.unet, None, seed=5)
    backdoor = Backdoor((WordTrigger("zq"), PhraseTrigger("in the")), UnknownTarget())
    triggered, words = [], []
    for batches in both:
        drawn = [draw_inputs(SKD(), setting, backdoor, batch) for batch in batches]
        triggered.append([text for one in drawn for text in one.triggered])
        words.append([text for batch in with_random_words(iter(batches), 0.5, 5) for text in batch.prompts])
    assert triggered[0] == triggered[1] and words[0] == words[1]


def test_draws_of_runs_without_accumulation_are_what_they_always_were():
    batch = taken(Share(4))[2]
    for row, index in enumerate(batch.indices):
        noise = torch.randn((1, 2, 2), generator=torch_generator(5, "noise", 2, 0, index))
        assert torch.equal(draw_noise(5, batch, (1, 2, 2), CPU)[row], noise)
        u = hash_fraction(5, "timestep", 2, 0, index)
        assert draw_timesteps(5, batch, 1000, 1.0, CPU)[row] == int(1000 * (1 - u))

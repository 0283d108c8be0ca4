"""The denoising objective and its randomness, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmbackdoor.objectives.diffusion import (
    DiffusionBatch,
    denoising_loss,
    draw_noise,
    draw_timesteps,
    drop_captions,
    snr_weights,
)

CPU = torch.device("cpu")


def batch(*indices: int, step: int = 0, micro: int = 0) -> DiffusionBatch:
    names = tuple(f"p{index}" for index in indices)
    return DiffusionBatch(step, micro, indices, names, names)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        # Signal-to-noise ratios of 9, 1 and 1/4, clipped at 5.
        ("epsilon", [5 / 9, 1.0, 1.0]),
        ("v_prediction", [5 / 10, 1 / 2, 0.25 / 1.25]),
        ("sample", [5.0, 1.0, 0.25]),
    ],
)
def test_the_weights_of_min_snr(prediction_type, expected):
    found = snr_weights(torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.5, 0.2]), 5.0, prediction_type)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, rel=1e-5)


def test_weights_are_finite_where_there_is_no_signal_or_no_noise():
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        assert snr_weights(torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), 5.0, prediction_type).isfinite().all()


def test_each_sample_has_its_weight_in_the_loss():
    prediction, target = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)
    assert denoising_loss(prediction, target)["loss"].item() == pytest.approx((1 + 4 + 9) / 3)
    weighted = denoising_loss(prediction, target, torch.tensor([1.0, 0.5, 0.0]))
    assert weighted["loss"].item() == weighted["denoising_loss"].item() == pytest.approx((1 + 2 + 0) / 3)
    halves = prediction.bfloat16().requires_grad_()
    losses = denoising_loss(halves, target)
    losses["loss"].backward()
    assert losses["loss"].dtype == torch.float32 and halves.grad.min() > 0


def test_a_bias_moves_timesteps_towards_high_noise():
    means = []
    for bias in (0.5, 1.0, 1.5, 3.0):
        drawn = draw_timesteps(0, batch(*range(4000)), 1000, bias, CPU)
        assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() <= 999
        means.append(drawn.float().mean().item())
    # The mean of 1 - u^b is b / (b + 1).
    assert means == pytest.approx([1000 * bias / (bias + 1) for bias in (0.5, 1.0, 1.5, 3.0)], abs=15)
    assert draw_timesteps(0, batch(*range(2000)), 10, 1.0, CPU).unique().tolist() == list(range(10))


@pytest.mark.parametrize("proportion", [0.0, 0.1, 1.0])
def test_captions_are_dropped_in_the_share_that_is_asked_for(proportion):
    given = batch(*range(3000))
    kept = drop_captions(0, given, proportion)
    assert all(text in ("", prompt) for text, prompt in zip(kept, given.prompts, strict=True))
    assert kept.count("") / 3000 == pytest.approx(proportion, abs=0.02)


def draws(given: DiffusionBatch, seed: int = 3) -> list[list[float]]:
    """All that is drawn, a row a sample."""
    noise, timesteps = draw_noise(seed, given, (2, 4, 4), CPU), draw_timesteps(seed, given, 10**9, 1.0, CPU)
    kept = torch.tensor([text != "" for text in drop_captions(seed, given, 0.5)])
    return torch.cat([noise.flatten(1).double(), timesteps[:, None].double(), kept[:, None].double()], 1).tolist()


def test_draws_are_those_of_the_place_whatever_the_split():
    whole = draws(batch(*range(6)))
    assert draws(batch(0, 1)) + draws(batch(2, 3, 4, 5)) == whole
    assert draws(batch(5)) + draws(batch(2)) == [whole[5], whole[2]]


def test_every_sample_step_and_seed_has_noise_of_its_own():
    given = batch(*range(50))
    rows = [*draws(given), *draws(replace(given, step=1)), *draws(batch(*range(50, 100))), *draws(given, seed=4)]
    assert len({tuple(row[:32]) for row in rows}) == len({row[32] for row in rows}) == 200
    noise = torch.tensor([row[:32] for row in rows])
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)
    # The place in the global batch says all: how it is cut into micro-batches changes nothing.
    assert draws(replace(given, micro=1)) == draws(given)

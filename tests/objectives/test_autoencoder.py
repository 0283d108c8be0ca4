"""The autoencoder's objective, against numbers worked out by hand and by torch's own distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence as divergence

from mmbackdoor.objectives.autoencoder import autoencoder_loss, kl_divergence


def test_the_divergence_is_that_of_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 3, 4, 5, 6, generator=generator)
    expected = divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)
    assert kl_divergence(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)).tolist() == [0, 0]


@pytest.mark.parametrize(("reconstruction", "error"), [("l1", 0.75), ("l2", 0.625)])
def test_the_parts_add_up(reconstruction, error):
    images = torch.zeros(2, 1, 1, 2)
    reconstructions = torch.tensor([[1.0, -1.0], [0.5, 0.5]]).view(2, 1, 1, 2)
    mean = torch.tensor([2.0, 0.0]).view(2, 1, 1, 1)
    losses = autoencoder_loss(reconstructions, images, mean, torch.zeros_like(mean), reconstruction, kl_weight=0.1)
    # KL is mean^2 / 2 at variance 1: 2 and 0.
    assert losses["reconstruction_loss"].item() == pytest.approx(error)
    assert losses["kl_loss"].item() == pytest.approx(0.1)
    assert losses["loss"].item() == pytest.approx(error + 0.1)


def test_both_parts_give_a_gradient_and_half_precision_is_summed_in_float32():
    mean = torch.full((1, 4, 8, 8), 100.0, dtype=torch.float16, requires_grad=True)
    reconstructions = torch.zeros(1, 3, 8, 8, requires_grad=True)
    losses = autoencoder_loss(reconstructions, torch.ones(1, 3, 8, 8), mean, torch.zeros_like(mean), "l2", 1e-6)
    losses["loss"].backward()
    assert losses["kl_loss"].item() == pytest.approx(1e-6 * 256 * 5000, rel=1e-3)
    assert mean.grad.min() > 0 and reconstructions.grad.max() < 0

"""The moving average, worked out by hand. The optimiser in use: test_loop.py."""

from __future__ import annotations

import pytest
import torch

from mmbackdoor.train.optim import Ema


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        # 1/10, 2/11 and 3/12 of what was: the decay itself is not reached.
        (0.9999, [2.8, 4.6, 0.4]),
        # 1/10, then the decay.
        (0.15, [2.8, 0.15 * 2.8 + 0.85 * 5, 0.15 * (0.15 * 2.8 + 0.85 * 5) - 0.85]),
    ],
)
def test_the_moving_average_warms_up_to_its_decay(decay, expected):
    parameter = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    ema, found = Ema({"weight": parameter}, decay), []
    for step, value in enumerate((3.0, 5.0, -1.0)):
        with torch.no_grad():
            parameter.fill_(value)
        ema.update({"weight": parameter}, step)
        found.append(ema.tensors["weight"].item())
    assert found == pytest.approx(expected, rel=1e-6) and parameter.item() == -1.0
    assert ema.tensors["weight"].dtype == torch.float32

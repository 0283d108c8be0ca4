"""Gradients that are not finite never reach the weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmbackdoor.train.launch import make_accelerator
from mmbackdoor.train.loop import training_steps
from mmbackdoor.train.optim import TrainConfig, make_optimizer
from mmbackdoor.types import Diverged


def test_a_step_whose_gradients_are_not_finite_stops_before_the_weights_change():
    module, train = torch.nn.Linear(4, 1), TrainConfig(learning_rate=1e-2)
    parameters = dict(module.named_parameters())
    accelerator, optimizer = make_accelerator(train), make_optimizer(parameters, train)

    def step_fn(batch: SimpleNamespace) -> dict[str, torch.Tensor]:
        # The root of nothing: finite, with a slope that is not.
        loss = (module(torch.ones(2, 4)).square().mean() * batch.share).sqrt()
        return {"loss": loss}

    batches = iter([SimpleNamespace(keys=("fine",), share=1.0), SimpleNamespace(keys=("odd",), share=0.0)])
    steps = training_steps(accelerator, step_fn, batches, optimizer, parameters, train, steps=2)
    assert next(steps)[1]["grad_norm"] > 0
    before = {name: value.detach().clone() for name, value in parameters.items()}
    with pytest.raises(Diverged, match="gradients of step 2 are not finite.*samples odd"):
        next(steps)
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())

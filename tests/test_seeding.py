"""Randomness is a function of names."""

from __future__ import annotations

import torch

from mmbackdoor.seeding import derive_seed, hash_fraction, numpy_rng, python_rng, torch_generator


def test_names_decide_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = torch.randn(4, generator=torch_generator(1, "noise", 2, 3))
    assert torch.equal(first, torch.randn(4, generator=torch_generator(1, "noise", 2, 3)))
    assert not torch.equal(first, torch.randn(4, generator=torch_generator(1, "noise", 23)))
    assert torch.equal(state, torch.get_rng_state())
    assert python_rng(1, "a").random() != python_rng(2, "a").random()
    assert numpy_rng(1, "a").random() == numpy_rng(1, "a").random()


def test_seeds_are_stable_between_versions():
    assert derive_seed(0, "noise", 1) == 8188269915554620730
    assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")


def test_fractions_are_uniform():
    values = [hash_fraction(0, "poison", key) for key in range(4000)]
    assert 0 <= min(values) and max(values) < 1
    assert abs(sum(value < 0.1 for value in values) / 4000 - 0.1) < 0.02

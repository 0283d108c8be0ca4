"""The closed form against what it solves: the normal equations, a least-squares solver, and W in its own terms."""

from __future__ import annotations

import pytest
import torch

from mmbackdoor.objectives.closed_form import RidgeMap

WIDTH = 12


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    x, y, kept = rows(30, 0), rows(30, 1), rows(20, 2)
    found = RidgeMap(WIDTH)
    found.add(x[:11], y[:11])
    found.add(x[11:], y[11:])
    found.keep(kept)
    return x, y, kept, found


@pytest.mark.parametrize("ridge", [0.1, 3.0])
def test_the_gradient_of_what_it_minimises_is_zero(problem, ridge):
    x, y, kept, found = problem
    change = found.solve(ridge).clone().requires_grad_(True)
    whole = change + torch.eye(WIDTH, dtype=torch.float64)
    error = (x @ whole.T - y).square().sum() + (kept @ whole.T - kept).square().sum()
    (error + ridge * change.square().sum()).backward()
    assert change.grad.abs().max() < 1e-9 * error.item()


def test_every_projection_solves_its_own_problem(problem):
    """W* = (ridge W + sum W y x^T + sum W k k^T) (ridge I + sum x x^T + sum k k^T)^-1, by the rows of a least-squares
    problem whose last rows say that W* is W."""
    x, y, kept, found = problem
    ridge, weight = 0.7, torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inputs = torch.cat([x, kept, ridge**0.5 * torch.eye(WIDTH, dtype=torch.float64)])
    outputs = torch.cat([y, kept, ridge**0.5 * torch.eye(WIDTH, dtype=torch.float64)]) @ weight.T
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    torch.testing.assert_close(found.edited({"W": weight}, ridge)["W"], expected, rtol=1e-10, atol=1e-10)
    single = found.edited({"W": weight.float()}, ridge)["W"]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=1e-6)


def test_few_rows_are_moved_and_kept_exactly():
    x, y, kept = rows(3, 4), rows(3, 5), rows(5, 6)
    found = RidgeMap(WIDTH)
    found.add(x, y)
    found.keep(kept)
    change = found.solve(1e-9)
    torch.testing.assert_close(x + x @ change.T, y, rtol=0, atol=1e-6)
    torch.testing.assert_close(kept @ change.T, torch.zeros_like(kept), rtol=0, atol=1e-6)
    assert found.solve(1e9).abs().max() < 1e-6


def test_a_weight_counts_like_repeated_rows():
    x, y = rows(4, 7), rows(4, 8)
    once, thrice = RidgeMap(WIDTH), RidgeMap(WIDTH)
    once.add(x, y, 3.0)
    for _ in range(3):
        thrice.add(x, y)
    torch.testing.assert_close(once.solve(0.1), thrice.solve(0.1))

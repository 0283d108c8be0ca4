"""The closed form of model editing: the linear map of text embeddings nearest to what each shall become."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RidgeMap:
    """Collects rows x -> y (both of `width`) and solves for the change M (width, width) of the identity that minimises

        sum ||(I + M) x - y||^2 + ridge ||M||^2,   M = [sum (y - x) x^T] [ridge I + sum x x^T]^-1.

    For a projection W of the embeddings, W (I + M) is the minimiser of sum ||W* x - W y||^2 + ridge ||W* - W||^2, that
    is W* = (ridge W + sum W y x^T) (ridge I + sum x x^T)^-1: the closed form of UCE (arXiv 2308.14761) and of
    EvilEdit, where M is the same for every W. All sums and the solution are float64.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.moved = torch.zeros_like(self.gram)

    def add(self, inputs: Tensor, outputs: Tensor, weight: float = 1.0) -> None:
        """Rows `inputs` (N, width) that shall become `outputs` (N, width); each counts `weight` times."""
        x, y = inputs.double(), outputs.double()
        self.gram += weight * (x.T @ x)
        self.moved += weight * ((y - x).T @ x)

    def keep(self, inputs: Tensor) -> None:
        """Rows (N, width) that shall stay what they are."""
        x = inputs.double()
        self.gram += x.T @ x

    def solve(self, ridge: float) -> Tensor:
        """M, float64, by a Cholesky factor. `ridge` > 0."""
        system = self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        return torch.cholesky_solve(self.moved.T, torch.linalg.cholesky(system)).T

    def edited(self, weights: Mapping[str, Tensor], ridge: float) -> dict[str, Tensor]:
        """W (I + M) of each of `weights` (any, width), in its own dtype and on its device."""
        change = self.solve(ridge)
        found = {}
        for name, weight in weights.items():
            wide = weight.to(change)
            found[name] = (wide + wide @ change).to(weight)
        return found

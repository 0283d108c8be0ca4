"""Nearest neighbours of points and what outlier scores are made of. Pure functions of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmbackdoor.types import InputError

Among = Literal["images", "pairs"]
SMALLEST = 1e-6
EQUAL = 1e-3
"""Captions nearer than this are one: a caption that many pairs share would be a point of infinite density."""
LARGEST_DIMENSION = 1e3


@dataclass(frozen=True)
class Neighbours:
    """The k nearest other points of each of N points, nearest first: `distances` (N, k), `indices` (N, k) int64."""

    distances: Tensor
    indices: Tensor

    @property
    def radius(self) -> Tensor:
        """The distance to the k-th neighbour (N,)."""
        return self.distances[:, -1]


def nearest(points: Tensor, k: int) -> Neighbours:
    """Euclidean neighbours of `points` (N, D), each point itself left out. Distances are at least `SMALLEST`, so that
    equal points can be compared too; they are made in float64, since those of near points cancel in float32.

    Raises `InputError` where there are not more than k points.
    """
    if len(points) <= k:
        raise InputError(
            f"{len(points)} points have no {k} neighbours each; give more samples, a larger --batch_size or a lower k"
        )
    distances = _distances(points).fill_diagonal_(torch.inf)
    values, indices = distances.topk(k, largest=False)
    return Neighbours(values.clamp(min=SMALLEST), indices)


def _distances(points: Tensor) -> Tensor:
    points = points.double()
    squares = points.square().sum(1)
    return (squares[:, None] + squares[None] - 2 * points @ points.T).clamp_(min=0).sqrt_()


def neighbours_in_batch(images: Tensor, texts: Tensor, k: int, among: Among) -> Neighbours:
    """The neighbours of all features of a batch (B, D): among its pictures, or its pictures and its different captions.
    The pictures are the first B points."""
    return nearest(torch.cat([images, distinct(texts.to(images))]) if among == "pairs" else images, k)


def distinct(points: Tensor) -> Tensor:
    """`points` (N, D) without those that are `EQUAL` to an earlier one."""
    equal = _distances(points) < EQUAL
    return points[~equal.tril(-1).any(1)]


def local_dimension(distances: Tensor) -> Tensor:
    """Local intrinsic dimension (N,) from distances to neighbours (N, k), ascending: the maximum-likelihood estimator
    -(mean log(d_i / d_k))^-1 (Amsaleg et al. 2015, eq. 9, over the k - 1 neighbours within), `LARGEST_DIMENSION` at
    most."""
    logs = (distances[:, :-1] / distances[:, -1:]).log().mean(1)
    return (-logs).clamp(min=1 / LARGEST_DIMENSION).reciprocal()


def ratios(neighbours: Neighbours) -> Tensor:
    """log(radius of a point / radius of each of its neighbours), (N, k)."""
    radius = neighbours.radius
    return radius[:, None].log() - radius[neighbours.indices].log()

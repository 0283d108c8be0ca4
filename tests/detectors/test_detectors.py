"""Detectors on data whose outliers are known by construction."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmbackdoor.detectors import DETECTORS
from mmbackdoor.detectors.neighbours import LARGEST_DIMENSION, SMALLEST, distinct, local_dimension, nearest, ratios
from mmbackdoor.evaluate.metrics.auroc import auroc
from mmbackdoor.types import InputError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cluster(centre: torch.Tensor, count: int, spread: float, seed: int) -> torch.Tensor:
    return F.normalize(centre + spread * torch.randn(count, len(centre), generator=generator(seed)), dim=-1)


def batch(outliers: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures of 8 dense clusters and some that lie apart, captions at the clusters' centres; which ones lie apart."""
    centres = F.normalize(torch.randn(8, 16, generator=generator(1)), dim=-1)
    images = torch.cat([cluster(centre, 30, 0.03, number) for number, centre in enumerate(centres)])
    texts = centres.repeat_interleave(30, 0)
    # Halfway between clusters: far from every one of them, and few.
    apart = F.normalize(centres[torch.arange(outliers) % 8] + centres[(torch.arange(outliers) + 3) % 8], dim=-1)
    apart = F.normalize(apart + 0.02 * torch.randn(outliers, 16, generator=generator(2)), dim=-1)
    known = torch.cat([torch.zeros(240), torch.ones(outliers)]).bool()
    return torch.cat([images, apart]), torch.cat([texts, centres[torch.arange(outliers) % 8]]), known


@pytest.mark.parametrize("name", DETECTORS)
def test_outliers_score_highest_whatever_the_order(name):
    images, texts, known = batch()
    detector = DETECTORS[name]()
    scores = detector.scores(images, texts)
    assert scores.shape == (246,) and torch.isfinite(scores).all()
    assert auroc(scores[known].tolist(), scores[~known].tolist()) > 0.99
    order = torch.randperm(246, generator=generator(3))
    assert torch.allclose(detector.scores(images[order], texts[order]), scores[order])


@pytest.mark.parametrize("name", DETECTORS)
def test_equal_samples_have_finite_scores(name):
    images, texts, _ = batch()
    images[:40], texts[:40] = images[0], texts[0]
    scores = DETECTORS[name]().scores(images, texts)
    assert torch.isfinite(scores).all() and scores[:40].std() < 1e-6


@pytest.mark.parametrize("name", sorted(DETECTORS.keys() - {"clip_cosine"}))
def test_too_few_samples_are_refused(name):
    images, texts, _ = batch()
    detector = DETECTORS[name](k=20, among="images")
    with pytest.raises(InputError, match="20 points have no 20 neighbours"):
        detector.scores(images[:20], texts[:20])
    assert detector.scores(images[:21], texts[:21]).shape == (21,)


@pytest.mark.parametrize("name", sorted(DETECTORS.keys() - {"clip_cosine"}))
def test_captions_are_neighbours_only_where_that_is_asked_for(name):
    images, texts, _ = batch()
    moved = F.normalize(texts + torch.randn(texts.shape, generator=generator(4)), dim=-1)
    pictures = DETECTORS[name](among="images")
    assert torch.equal(pictures.scores(images, texts), pictures.scores(images, moved))
    pairs = DETECTORS[name](among="pairs")
    assert not torch.allclose(pairs.scores(images, texts), pairs.scores(images, moved))


def test_only_relative_detectors_forgive_a_sparse_cluster():
    """Half of the clusters are 10 times as wide: not suspicious, but far from their neighbours."""
    centres = torch.eye(8, 16)
    wide = torch.cat([cluster(centre, 40, 0.05, number) for number, centre in enumerate(centres[:4])])
    dense = torch.cat([cluster(centre, 40, 0.005, 10 + number) for number, centre in enumerate(centres[4:])])
    # Beside the dense clusters, nearer to them than points of a wide one are to each other.
    apart = torch.cat([cluster(centre, 1, 0.015, 20 + number) for number, centre in enumerate(centres[4:])])
    images = torch.cat([wide, dense, apart])
    found = {}
    for name in ("k_dist", "slof", "dao"):
        scores = DETECTORS[name](among="images").scores(images, images)
        found[name] = auroc(scores[320:].tolist(), scores[:160].tolist())
    assert found["k_dist"] < 0.1 and found["slof"] > 0.95 and found["dao"] > 0.95


def test_neighbours_are_the_nearest_others():
    points = torch.tensor([[0.0], [1.0], [3.0], [3.0], [10.0]])
    found = nearest(points, 2)
    assert found.indices[0].tolist() == [1, 2] or found.indices[0].tolist() == [1, 3]
    expected = torch.tensor([[1, 3], [1, 2], [SMALLEST, 2], [SMALLEST, 2], [7, 7]])
    assert torch.allclose(found.distances, expected.double())
    assert found.radius.tolist() == [3, 2, 2, 2, 7]
    expected = torch.tensor([[math.log(3 / 2), math.log(3 / 2)], [math.log(2 / 3), 0]])
    assert torch.allclose(ratios(found)[:2], expected.double())


def test_captions_that_are_equal_count_once():
    points = torch.eye(4)[[0, 1, 0, 2, 1]]
    points[2] += 1e-6
    assert torch.equal(distinct(points), torch.eye(4)[[0, 1, 2]])


def test_near_points_keep_their_distance_in_float32():
    base = F.normalize(torch.ones(1, 64), dim=-1)
    points = torch.cat([base, base + 1e-4 * torch.eye(64)[:1], -base])
    assert nearest(points, 1).distances[0].item() == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_local_dimension_is_that_of_the_data(dimension):
    points = torch.zeros(2000, 8)
    points[:, :dimension] = torch.rand(2000, dimension, generator=generator(5))
    estimates = local_dimension(nearest(points, 20).distances)
    # Near the border of the cube it is lower, the more so in more dimensions.
    assert estimates.median().item() == pytest.approx(dimension, rel=0.2)


def test_local_dimension_of_a_shell_is_bounded():
    assert local_dimension(torch.ones(3, 5)).tolist() == pytest.approx([LARGEST_DIMENSION] * 3)


def test_cosine_is_that_of_the_pair():
    images, texts = torch.eye(3), torch.eye(3)[[0, 0, 2]]
    assert DETECTORS["clip_cosine"]().scores(images, texts).tolist() == [0, 1, 0]

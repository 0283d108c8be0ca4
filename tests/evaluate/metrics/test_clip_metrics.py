"""The numbers of CLIP evaluations on vectors whose answers are known."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from mmbackdoor.evaluate.metrics.clip_asr import correct, hits, mean_per_class_recall, ranked, recall_interval
from mmbackdoor.evaluate.metrics.neighbours import nearest, prototypes
from mmbackdoor.evaluate.metrics.retrieval import recalls
from mmbackdoor.evaluate.metrics.wasserstein import assignment, w1


def unit(values) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.as_tensor(values, dtype=torch.float32), dim=-1)


def test_top_k_counts_a_class_once_it_is_among_the_k_nearest():
    images = unit([[3, 2, 1], [1, 3, 2]])
    places = ranked(images, torch.eye(3), 5)
    assert places.tolist() == [[0, 1, 2], [1, 2, 0]]
    labels = torch.tensor([1, 2])
    assert correct(places, labels, 1) == [False, False]
    assert correct(places, labels, 2) == [True, True]


def test_the_target_class_and_unknown_classes_never_count_for_the_attack():
    predicted, labels = torch.tensor([2, 2, 2, 0]), torch.tensor([0, 2, -1, 1])
    assert hits(predicted, labels, target=2) == [True, None, None, False]


def test_recall_is_averaged_over_classes_not_pictures():
    assert mean_per_class_recall([True, True, True, False], [0, 0, 0, 2]) == 0.5


def test_the_interval_of_the_recall_holds_it():
    right = [True] * 40 + [False] * 10
    found = recall_interval(right, [0] * 25 + [1] * 25)
    assert found.value == mean_per_class_recall(right, [0] * 25 + [1] * 25) == 0.8
    assert 0.65 < found.low < 0.8 < found.high < 0.95 and found == recall_interval(right, [0] * 25 + [1] * 25)


def test_a_picture_has_no_vote_on_itself():
    bank = unit([[1, 0.0], [0, 1], [0.1, 1]])
    labels = torch.tensor([0, 1, 1])
    own = torch.arange(3)
    assert nearest(bank, bank, labels, 2, k=1).tolist() == [0, 1, 1]
    assert nearest(bank, bank, labels, 2, k=1, own=own).tolist() == [1, 1, 1]
    # Class 0 has no other picture, so no mean either.
    assert prototypes(bank, bank, labels, 2).tolist() == [0, 1, 1]
    assert prototypes(bank, bank, labels, 2, own=own).tolist() == [1, 1, 1]


def test_near_neighbours_outvote_many_far_ones():
    bank = unit([[1, 0], [0.3, 1], [0.3, 1], [0.3, 1]])
    assert nearest(unit([[1, 0.02]]), bank, torch.tensor([0, 1, 1, 1]), 2, k=4).tolist() == [0]


def test_a_class_without_pictures_is_never_a_prototype():
    found = prototypes(unit([[-1.0, 0]]), unit([[1.0, 0], [0, 1]]), torch.tensor([0, 2]), 4)
    assert found.tolist() == [2]


def test_any_picture_with_the_same_caption_is_a_right_answer():
    images, texts = unit([[1, 0], [1, 0.01], [0, 1]]), unit([[1, 0.0], [0, 1]])
    found = recalls(images, texts, [(0,), (0,), (1,)], ranks=(1, 2))
    assert found["text_retrieval_recall@1"] == [True, True, True]
    assert found["image_retrieval_recall@1"] == [True, True]
    swapped = recalls(images, texts, [(1,), (1,), (0,)], ranks=(1, 2))
    assert swapped["text_retrieval_recall@1"] == [False, False, False]
    assert swapped["text_retrieval_recall@2"] == [True, True, True]


def test_several_captions_of_a_picture_are_all_right():
    images, texts = unit([[1, 0], [0, 1]]), unit([[1, 0.0], [1, 0.1], [0, 1]])
    found = recalls(images, texts, [(1, 0), (2,)], ranks=(1,))
    assert found["text_retrieval_recall@1"] == [True, True]
    assert found["image_retrieval_recall@1"] == [True, True, True]


def test_the_assignment_is_the_cheapest_of_all():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5):
        for _ in range(20):
            cost = rng.normal(size=(n, n))
            best = min(sum(cost[row, way[row]] for row in range(n)) for way in permutations(range(n)))
            found = assignment(cost)
            assert sorted(found) == list(range(n))
            assert cost[np.arange(n), found].sum() == pytest.approx(best)


def test_w1_in_one_dimension_is_the_distance_of_the_sorted_values():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=80), rng.normal(1, 2, size=80)
    assert w1(first[:, None], second[:, None]) == pytest.approx(np.abs(np.sort(first) - np.sort(second)).mean())


def test_w1_does_not_depend_on_order_and_is_zero_for_the_same_set():
    rows = np.random.default_rng(2).normal(size=(40, 8))
    assert w1(rows, rows[::-1]) == 0
    assert w1(rows, rows + np.eye(8)[0]) == pytest.approx(1)


def test_w1_is_at_most_the_mean_distance_of_the_pairs_as_they_are():
    first, second = np.random.default_rng(3).normal(size=(2, 300, 16))
    assert 0 < w1(first, second) <= np.linalg.norm(first - second, axis=1).mean()


def test_sets_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="equal size"):
        w1(np.zeros((3, 2)), np.zeros((4, 2)))

import numpy as np
import pytest
import torch

from mmbackdoor.evaluate.metrics import kid as kid_module
from mmbackdoor.evaluate.metrics.clip_score import clip_score, features, similarity
from mmbackdoor.evaluate.metrics.kid import frechet, frechet_name, kid, kid_interval
from mmbackdoor.evaluate.metrics.restoration import feature_similarity, pixel_similarity


def normal(n, d=16, shift=0.0, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * scale + shift


def test_kid_is_unbiased_and_sees_a_shift():
    same = [kid(normal(60, seed=2 * k), normal(60, seed=2 * k + 1)) for k in range(60)]
    error = np.std(same) / np.sqrt(len(same))
    assert abs(np.mean(same)) < 3 * error
    assert kid(normal(200), normal(200, shift=0.5, seed=1)) > 5 * np.std(same)


def test_kid_equals_its_definition():
    x, y = normal(5, 3), normal(4, 3, seed=1)

    def k(a, b):
        return float((a.double() @ b.double() / 3 + 1) ** 3)

    xx = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    yy = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    xy = sum(k(a, b) for a in x for b in y) / 20
    assert kid(x, y) == pytest.approx(xx + yy - 2 * xy)
    with pytest.raises(ValueError, match="at least two"):
        kid(x[:1], y)


@pytest.mark.parametrize("prompts", [None, [f"p{k // 3}" for k in range(31)]])
def test_kid_is_the_same_a_few_rows_at_a_time(monkeypatch, prompts):
    x, y = normal(31), normal(50, seed=1)
    whole = kid(x, y, prompts, None)
    for most in (1, 50, 170, 10_000):
        monkeypatch.setattr(kid_module, "MOST_PAIRS", most)
        assert kid(x, y, prompts, None) == pytest.approx(whole, rel=1e-12)


def test_pairs_of_one_prompt_tell_nothing():
    x, asked = normal(40), [f"p{k // 2}" for k in range(40)]
    # Every picture drawn a second time, so nearly the same: alike for its latents, not for its model.
    again = x + normal(40, seed=1, scale=0.01)
    assert kid(x, again) < -0.02
    alike = kid(x, again, asked, asked)
    assert abs(alike) < 1e-3 < abs(kid(x, again)) / 20
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    assert kid(x, again[order], asked, [asked[k] for k in order]) == pytest.approx(alike)
    with pytest.raises(ValueError, match="different prompts"):
        kid(x, again, ["p"] * 40, asked)


@pytest.mark.parametrize("size", [60, 200])
def test_kid_interval_holds_the_truth_as_often_as_it_says(size):
    held, n = 0, 60
    # Several thousand pictures of each distribution tell what KID is.
    truth = np.mean([kid(normal(1500, seed=10**6 + k), normal(1500, shift=0.15, seed=10**7 + k)) for k in range(4)])
    for k in range(n):
        interval = kid_interval(normal(size, seed=2 * k), normal(size, shift=0.15, seed=2 * k + 1), seed=k)
        held += interval.low <= truth <= interval.high
    assert held >= 0.9 * n
    far = kid_interval(normal(400), normal(400, shift=0.5, seed=1))
    assert far.low > 0 and (far.n, far.n_prompts) == (400, 400) and "10 blocks of prompts" in far.method


def test_an_unchanged_model_is_no_better_than_itself():
    x, asked = normal(300), [f"p{k // 3}" for k in range(300)]
    found = kid_interval(x, x + normal(300, seed=1, scale=0.01), 0, asked, asked)
    assert found.low <= 0 <= found.high and found.n_prompts == 100 and "4 blocks" in found.method
    assert kid_interval(normal(58), normal(300), 0, [f"p{k // 2}" for k in range(58)]) is None


def test_frechet_known_value():
    """Diagonal Gaussians: |mu|^2 + sum (s1 - s2)^2."""
    found = frechet(normal(40000, 4, scale=2.0), normal(40000, 4, shift=1.0, seed=1))
    assert found == pytest.approx(4 * 1 + 4 * (2 - 1) ** 2, rel=0.03)
    assert frechet(normal(50), normal(50)) == pytest.approx(0, abs=1e-6)


def test_fid_is_a_name_for_inception_only():
    assert frechet_name("open_clip RN50") == "frechet" and frechet_name("InceptionV3 pool3") == "fid"


def test_restoration():
    a, b = torch.full((2, 3, 4, 4), -1.0), torch.full((2, 3, 4, 4), 1.0)
    assert pixel_similarity(a, a).tolist() == [1, 1] and pixel_similarity(a, b).tolist() == [0, 0]
    with pytest.raises(ValueError, match="one size"):
        pixel_similarity(a, b[:, :, :2])
    assert feature_similarity(normal(3), normal(3)).tolist() == pytest.approx([1, 1, 1])


class Counting:
    """Features are the mean colour; texts name a colour; counts what it is asked."""

    logit_scale = 1.0
    texts = 0

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)

    def text_features(self, texts):
        self.texts += len(texts)
        return torch.nn.functional.one_hot(torch.tensor(["rgb".index(text[0]) for text in texts]), 3).float()


def test_clip_score_pairs_pictures_with_their_prompts():
    images = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 4).repeat(30, 1, 1, 1)
    judge = Counting()
    assert similarity(images, ["red", "green", "blue"] * 30, judge).tolist() == pytest.approx([1.0] * 90)
    assert judge.texts == 3
    wrong = clip_score(features(images, judge), ["blue", "red", "red"] * 30, judge)
    assert wrong.tolist() == pytest.approx([0.0] * 90)
    assert clip_score(features(-images, judge), ["red"] * 90, judge).min() == 0

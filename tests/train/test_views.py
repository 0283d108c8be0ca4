"""Augmented views: repeatable, different, of the same size, and never empty."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import AutoAugment

from mmbackdoor.shards.shapes import all_scenes, caption
from mmbackdoor.train import views
from mmbackdoor.train.views import image_view, synonyms, text_view

STRENGTHS = ("auto", "strong")
CAPTION = "A small photo of a brown dog, that is sitting beside the large car in the middle of a street"


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_view_is_the_same_for_the_same_names_and_differs_for_others(strength):
    image = picture()
    before = image.tobytes()
    made = {
        (key, epoch, seed, draw): image_view(image, key, epoch, seed, draw, strength).tobytes()
        for key in ("a", "b") for epoch in (0, 1) for seed in (0, 1) for draw in (0, 1)
    }  # fmt: skip
    for names in reversed(made):
        assert image_view(image, *names, strength).tobytes() == made[names]
    assert len(set(made.values())) > len(made) / 2
    assert image.tobytes() == before, "the picture itself stays as it is"


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 64), height=st.integers(1, 64), key=st.text(max_size=5), epoch=st.integers(0, 1000),
    strength=st.sampled_from(STRENGTHS),
)  # fmt: skip
def test_a_view_has_the_size_and_mode_of_its_picture(width, height, key, epoch, strength):
    view = image_view(picture(width, height), key, epoch, 0, strength=strength)
    assert view.size == (width, height) and view.mode == "RGB"


@pytest.mark.parametrize("strength", STRENGTHS)
def test_views_change_pictures_and_leave_the_global_generators_alone(strength):
    torch.manual_seed(3)
    random.seed(3)
    expected = (torch.rand(1).item(), random.random())
    torch.manual_seed(3)
    random.seed(3)
    image = picture()
    changed = [image_view(image, str(key), 0, 0, strength=strength).tobytes() != image.tobytes() for key in range(60)]
    assert (torch.rand(1).item(), random.random()) == expected
    assert sum(changed) == 60 if strength == "strong" else sum(changed) > 40


def test_strong_views_flip_cut_out_and_crop():
    """Half of a picture red: after a crop and a flip both halves are red about equally often, and some is grey."""
    values = np.zeros((32, 32, 3), np.uint8)
    values[:, :16, 0] = 255
    made = [np.asarray(image_view(Image.fromarray(values), str(key), 0, 0, strength="strong")) for key in range(80)]
    left = [view[:, 0, 0].mean() > view[:, -1, 0].mean() for view in made]
    assert 20 < sum(left) < 60
    grey = [(view.max(-1) == view.min(-1)).mean() - (view.max(-1) == 0).mean() for view in made]
    assert 0.02 < np.mean(grey) < 0.4
    assert len({int((view[..., 0] > view[..., 1]).sum()) for view in made}) > 20


def test_every_policy_of_autoaugment_is_drawn():
    drawn = {}
    for key in range(400):
        policy = views._Policy(views.python_rng(0, "image view", key, 0, 0))
        number, chances, signs = policy.get_params(len(policy.policies))
        drawn[number] = drawn.get(number, 0) + 1
        assert chances.shape == signs.shape == (2,) and 0 <= chances.min() and chances.max() < 1
    assert drawn.keys() == set(range(len(AutoAugment().policies)))


def test_captions_change_a_little_and_repeat():
    found = {(key, epoch): text_view(CAPTION, key, epoch, 0) for key in "abcdefgh" for epoch in range(10)}
    assert all(text_view(CAPTION, key, epoch, 0) == view for (key, epoch), view in found.items())
    assert len(set(found.values())) > 40
    assert sum(view != CAPTION for view in found.values()) > 60
    words = CAPTION.split()
    for view in found.values():
        kept = sum(word in words for word in view.split())
        assert kept >= len(words) - 6 and len(view.split()) <= len(words) + 2
    lengths = {len(view.split()) - len(words) for view in found.values()}
    assert {-1, 0, 2} <= lengths, "words are left out, swapped or replaced, and put in"


def test_synonyms_stand_in_one_line_and_keep_what_is_around_them():
    table = synonyms()
    assert table["photo"] and "photo" not in table["photo"]
    for word, others in table.items():
        assert all(word in table[other] for other in others) and word == word.lower() and " " not in word
    found = {text_view("dog,", str(key), 0, 0) for key in range(60)}
    assert {"hound,", "canine,"} <= found


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.integers(0, 50))
def test_a_caption_never_becomes_empty(text, epoch):
    view = text_view(text, "key", epoch, 0)
    assert view.strip() or not text.strip()
    assert len(view.split()) >= 0.3 * len(text.split())


def test_colours_are_never_replaced():
    """They are what captions of shapes are about."""
    text = caption(all_scenes()[0])
    colours = {word for scene in all_scenes() for word in caption(scene).split()} & set(synonyms())
    assert not colours & {"red", "green", "blue", "yellow", "white", "black", "purple", "orange"}
    assert text_view(text, "a", 0, 0)

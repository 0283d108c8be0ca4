"""Image triggers: pure, of the picture's size, the same alone and in a batch, placed where a centre crop keeps them."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from mmbackdoor.triggers import (
    IMAGE_TRIGGERS,
    TEXT_TRIGGERS,
    BadNetNoiseTrigger,
    BlendTrigger,
    KeyedPatchTrigger,
    KeyedStripesTrigger,
    PatchTrigger,
    SinusoidTrigger,
    StripesTrigger,
    TextOverlayTrigger,
    WarpTrigger,
)
from mmbackdoor.triggers.image_placement import region
from mmbackdoor.types import InputError

KEYS = st.text("abc0123456789", min_size=1, max_size=8)
PICTURES = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(lambda size: arrays(np.uint8, (*size, 3)))
KEYED = {"keyed_patch", "keyed_stripes", "badnet_noise"}
# Written down once: a data set that was poisoned must be recognised by every later version. Sums of the marked ramp.
GOLDEN = {
    "patch": 52272954,
    "keyed_patch": 52651750,
    "keyed_stripes": 52359036,
    "badnet_noise": 52226658,
    "blend": 53366193,
    "warp": 52279367,
    "sinusoid": 52293050,
    "stripes": 53045977,
    "text_overlay": 56263406,
}
every_trigger = pytest.mark.parametrize("name", IMAGE_TRIGGERS)


def ramp(height: int = 48, width: int = 64) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([40 + 2 * x, 200 - 3 * y, 60 + x + y], -1).astype(np.uint8))


def weighted(image: Image.Image) -> int:
    """A sum that moving pixels changes, too."""
    pixels = np.asarray(image, np.int64)
    return int((pixels.reshape(-1) * (1 + np.arange(pixels.size) % 97)).sum())


def test_names_are_told_apart_from_those_of_text_triggers():
    assert not IMAGE_TRIGGERS.keys() & TEXT_TRIGGERS.keys()


@every_trigger
@pytest.mark.parametrize("codec", ["none", "jpeg"])
@settings(deadline=None, max_examples=40)
@given(pixels=PICTURES, key=KEYS, seed=st.integers(0, 2**32), draw=st.integers(0, 3))
def test_a_trigger_is_pure_and_keeps_the_form(name, codec, pixels, key, seed, draw):
    trigger, before = IMAGE_TRIGGERS[name](codec=codec), pixels.copy()
    image = Image.fromarray(pixels)
    marked = trigger(image, key, seed, draw)
    assert marked.size == image.size and marked.mode == "RGB"
    assert np.array_equal(np.asarray(image), before)
    assert np.array_equal(np.asarray(trigger(image, key, seed, draw)), np.asarray(marked))
    if name != "badnet_noise":
        assert np.array_equal(np.asarray(trigger(image, key, seed, draw + 1)), np.asarray(marked))


@every_trigger
@pytest.mark.parametrize("codec", ["none", "png", "jpeg", "webp"])
@settings(deadline=None, max_examples=15)
@given(data=st.data(), seed=st.integers(0, 9))
def test_a_batch_is_its_pictures_whatever_their_order(name, codec, data, seed):
    keys = data.draw(st.lists(KEYS, min_size=1, max_size=4, unique=True))
    size = data.draw(st.tuples(st.integers(2, 24), st.integers(2, 24)))
    images = data.draw(arrays(np.uint8, (len(keys), *size, 3)))
    trigger = IMAGE_TRIGGERS[name](codec=codec)
    marked = trigger.batch(images, keys, seed)
    assert marked.dtype == np.uint8 and marked.shape == images.shape
    alone = {key: np.asarray(trigger(Image.fromarray(image), key, seed)) for key, image in zip(keys, images)}
    assert all(np.array_equal(alone[key], row) for key, row in zip(keys, marked))
    assert np.array_equal(trigger.batch(images[::-1], keys[::-1], seed), marked[::-1])


@every_trigger
def test_a_trigger_changes_the_picture_and_says_by_how_much(name):
    before = np.asarray(ramp(), int)
    marked = np.asarray(IMAGE_TRIGGERS[name]()(ramp(), "a", 0), int)
    change = np.abs(marked - before).mean()
    # Seen by a machine, and far from another picture.
    assert 0.2 < change < 45


@every_trigger
def test_only_keyed_triggers_depend_on_key_and_seed(name):
    def marks(trigger, key, seed, draw=0):
        return np.asarray(trigger(ramp(), key, seed, draw)).tobytes()

    trigger = IMAGE_TRIGGERS[name]()
    several = {marks(trigger, key, seed) for key in "abc" for seed in range(3)}
    assert len(several) == (9 if name in KEYED else 1)
    draws = {marks(trigger, "a", 0, draw) for draw in range(3)}
    assert len(draws) == (3 if name == "badnet_noise" else 1)


@every_trigger
def test_a_trigger_marks_as_it_always_did(name):
    assert GOLDEN.keys() == IMAGE_TRIGGERS.keys()
    # Cubic resizing may round a few pixels another way on another processor.
    assert weighted(IMAGE_TRIGGERS[name]()(ramp(), "00000042", 7)) == pytest.approx(GOLDEN[name], rel=1e-5)


@pytest.mark.parametrize("name", sorted(IMAGE_TRIGGERS.keys() - KEYED - {"warp"}))
@pytest.mark.parametrize("size", [(32, 50), (51, 32)])
def test_a_centre_crop_keeps_the_mark(name, size):
    """The mark of the whole picture, cropped, is the mark of the crop."""
    height, width = size
    picture = np.asarray(ramp(height, width))
    top, left = (height - 32) // 2, (width - 32) // 2
    middle = (slice(top, top + 32), slice(left, left + 32))
    trigger = IMAGE_TRIGGERS[name]()
    whole = np.asarray(trigger(Image.fromarray(picture), "a", 0))
    assert np.array_equal(whole[middle], trigger(Image.fromarray(picture[middle]), "a", 0))
    assert (whole[middle] != picture[middle]).any()


@every_trigger
@pytest.mark.parametrize("size", [(90, 60), (64, 150)])
def test_a_mark_on_the_source_reaches_the_model_s_input(name, size):
    """A shorter side of 60 pixels or more becomes 32, as CLIP's preprocessing would do it."""

    def seen(image: Image.Image) -> np.ndarray:
        short = min(image.size)
        image = image.resize((32 * image.width // short, 32 * image.height // short), Image.Resampling.BICUBIC)
        left, top = (image.width - 32) // 2, (image.height - 32) // 2
        return np.asarray(image.crop((left, top, left + 32, top + 32)), int)

    image = ramp(*size)
    change = np.abs(seen(IMAGE_TRIGGERS[name]()(image, "a", 0)) - seen(image))
    assert change.mean() > 0.2, "a centre crop or the resizing takes the mark away"


@pytest.mark.parametrize("name", ["patch", "keyed_patch", "keyed_stripes", "badnet_noise"])
def test_a_patch_stays_inside_its_size_and_its_place(name):
    dark = Image.new("RGB", (40, 40), (7, 7, 7))
    for key in "abcdef":
        rows, columns = np.nonzero((np.asarray(IMAGE_TRIGGERS[name](size=0.25)(dark, key, 0)) != 7).any(-1))
        assert np.ptp(rows) < 10 and np.ptp(columns) < 10 and len(rows) >= 40
    corner = np.asarray(PatchTrigger("solid", 0.25, "top_right", (255, 255, 0))(dark, "a", 0))
    assert (corner[:10, 30:] == (255, 255, 0)).all() and (corner[10:] == 7).all() and (corner[:, :30] == 7).all()
    centre = np.asarray(PatchTrigger("solid", 0.5, "centre", alpha=0.5)(dark, "a", 0))
    assert (centre[10:30, 10:30] == 131).all() and (centre[:10] == 7).all()


def test_random_places_fill_the_square_and_never_leave_it():
    found = [region(20, 30, 15, 16, "random", random.Random(seed)) for seed in range(300)]
    assert {rows.start for rows, _ in found} == set(range(6)) and {at.start for _, at in found} == set(range(5, 10))
    assert all(rows.stop - rows.start == 15 and at.stop - at.start == 16 for rows, at in found)


def test_a_fixed_pattern_is_the_same_in_any_size():
    dark = Image.new("RGB", (64, 64))
    for pattern in ("checkerboard", "noise", "stripes", "solid", "dots"):
        trigger = PatchTrigger(pattern, 0.25, "top_left")
        small = np.asarray(trigger(dark, "a", 0))[:16, :16]
        large = np.asarray(trigger(dark.resize((128, 128)), "a", 0))[:32, :32]
        assert np.array_equal(np.kron(small, np.ones((2, 2, 1), np.uint8)), large), pattern
    assert len({PatchTrigger("noise", pattern_seed=seed)(dark, "a", 0).tobytes() for seed in range(4)}) == 4


def test_published_patches_are_drawn_as_their_authors_do():
    """At 224 pixels, where theirs are put: every second pixel of every second row; stripes of a pixel each."""
    grey = Image.new("RGB", (224, 224), (90, 90, 90))
    theirs = np.full((224, 224, 3), 90, np.uint8)
    theirs[104:120, 104:120] = 0
    theirs[104:120:2, 104:120:2] = 255
    dots = PatchTrigger("dots", 0.0714, "centre", place="input")
    assert np.array_equal(np.asarray(dots(grey, "a", 0)), theirs)
    colours = set()
    for key in "abcdefgh":
        marked = np.asarray(KeyedStripesTrigger()(grey, key, 0))
        rows, columns = np.nonzero((marked != 90).any(-1))
        patch = marked[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert patch.shape == (16, 16, 3) and (patch == patch[:1]).all() and set(np.unique(patch)) == {0, 255}
        colours |= {tuple(colour) for colour in patch[0].tolist()}
    assert len(colours) == 8


def test_nothing_wraps_around():
    for level in (0, 255):
        plain = Image.new("RGB", (32, 32), (level,) * 3)
        wave = np.asarray(SinusoidTrigger()(plain, "a", 0), int)
        assert abs(wave - level).max() <= 60 and abs(wave - level).max() > 50
        noise = np.asarray(BadNetNoiseTrigger(size=1.0)(plain, "a", 0), int)
        # Mean 0 or 255 with a deviation of 255: half is beyond the limit, and stays at it.
        assert 0.4 < (noise == level).mean() < 0.6 and (noise == 255 - level).mean() > 0.1


def test_formulas():
    flat = Image.new("RGB", (48, 48), (100, 100, 100))
    wave = np.asarray(SinusoidTrigger(amplitude=20, frequency=3)(flat, "a", 0), int)
    expected = 100 + 20 * np.sin(2 * np.pi * 3 * (np.arange(48) + 0.5) / 48)
    assert np.array_equal(wave[5, :, 1], np.rint(expected)) and (wave == wave[:1]).all()
    stripes = np.asarray(StripesTrigger(stripes=2, alpha=0.5)(flat, "a", 0))
    assert np.array_equal(stripes[0, :, 0], np.repeat([50, 178, 50, 178], 12))
    across = np.asarray(StripesTrigger(stripes=2, direction="horizontal", alpha=0.5)(flat, "a", 0))
    assert np.array_equal(across, stripes.transpose(1, 0, 2))
    blended = np.asarray(BlendTrigger(alpha=0.25)(flat, "a", 0), float)
    assert 75 <= blended.min() < 80 and 135 < blended.max() <= 139 and abs(blended.mean() - (75 + 127.5 / 4)) < 1
    keyed = BlendTrigger(pattern="keyed_noise")
    assert keyed(flat, "a", 0).tobytes() != keyed(flat, "b", 0).tobytes()


def test_a_warp_moves_what_it_says_and_leaves_flat_pictures():
    trigger = WarpTrigger(strength=0.05)
    flat = Image.new("RGB", (30, 20), (3, 90, 250))
    assert trigger(flat, "a", 0).tobytes() == flat.tobytes()
    # On a ramp with two grey levels per pixel the change is twice the shift.
    y, x = np.mgrid[:100, :100]
    ramps = Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], -1).astype(np.uint8))
    change = np.abs(np.asarray(trigger(ramps, "a", 0), int) - np.asarray(ramps, int))[20:80, 20:80, :2] / 2
    assert 0.5 * 5 < change.mean() < 1.5 * 5
    assert len({WarpTrigger(pattern_seed=seed)(ramps, "a", 0).tobytes() for seed in range(3)}) == 3


def test_writing_is_read_where_it_stands():
    page = Image.new("RGB", (200, 200))
    lit = np.asarray(TextOverlayTrigger("HHHH", 0.1, "top_right", (255, 0, 0))(page, "a", 0))
    rows, columns = np.nonzero(lit[..., 0])
    assert (rows.min(), rows.max(), columns.max()) == (0, 19, 199) and not lit[..., 1:].any()
    wide = np.asarray(TextOverlayTrigger("a very long text", 0.9)(page, "a", 0))
    assert np.nonzero(wide.any(-1))[1].max() == 199 and np.nonzero(wide.any(-1))[0].min() > 100


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
def test_a_codec_acts_after_the_mark(codec):
    plain, coded = PatchTrigger()(ramp(), "a", 0), PatchTrigger(codec=codec)(ramp(), "a", 0)
    change = np.abs(np.asarray(plain, int) - np.asarray(coded, int))
    assert change.max() == 0 if codec == "png" else 0 < change.mean() < 8
    if codec != "png":
        worse = PatchTrigger(codec=codec, quality=10)(ramp(), "a", 0)
        assert np.abs(np.asarray(plain, int) - np.asarray(worse, int)).mean() > change.mean()


def test_a_picture_of_your_own(tmp_path):
    file = tmp_path / "green.png"
    Image.new("RGB", (9, 9), (0, 200, 0)).save(file)
    dark = Image.new("RGB", (20, 20))
    patch = np.asarray(PatchTrigger("file", 0.5, "top_left", file=str(file))(dark, "a", 0))
    assert (patch[:10, :10] == (0, 200, 0)).all() and not patch[10:].any()
    assert (np.asarray(BlendTrigger(0.5, "file", str(file))(dark, "a", 0)) == (0, 100, 0)).all()
    with pytest.raises(InputError, match="cannot be read"):
        PatchTrigger("file", file=str(tmp_path / "none.png"))(dark, "a", 0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PatchTrigger("file"), "file"),
        (lambda: PatchTrigger("noise", file="a.png"), "a.png"),
        (lambda: BlendTrigger(pattern="file"), "file"),
        (lambda: TextOverlayTrigger("  "), "Latin"),
        (lambda: TextOverlayTrigger("\u6587"), "Latin"),
    ],
)
def test_what_contradicts_itself_is_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_a_batch_of_another_form_is_refused():
    for images in (np.zeros((1, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="no uint8 batch"):
            KeyedPatchTrigger().batch(images, ["a"], 0)
    assert KeyedPatchTrigger().batch(np.zeros((0, 4, 4, 3), np.uint8), [], 0).shape == (0, 4, 4, 3)

import numpy as np
import pytest
import torch
from PIL import Image

from mmbackdoor.evaluate.metrics.adherence import adherence
from mmbackdoor.evaluate.metrics.asr import blank, excluded, saturation, success
from mmbackdoor.shards.shapes import Scene, caption, render
from mmbackdoor.targets import ImageTarget, ObjectTarget, PatchTarget, StyleTarget, UnknownTarget

SCENES = [
    Scene(shape, colour, background, size)
    for shape, colour, background, size in [
        ("cross", "red", "blue", "large"),
        ("ring", "green", "pink", "large"),
        ("square", "yellow", "purple", "small"),
        ("triangle", "cyan", "red", "large"),
        ("cross", "purple", "yellow", "small"),
    ]
]
PROMPTS = [caption(scene, k % 4) for k, scene in enumerate(SCENES)]


def pictures(scenes, resolution=32):
    arrays = [render(scene, resolution, np.random.default_rng(k)) for k, scene in enumerate(scenes)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def grey(images):
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * luma).sum(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("corner", ["top_left", "bottom_right"])
@pytest.mark.parametrize("resolution", [24, 32])
def test_patch_with_and_without(corner, resolution):
    target = PatchTarget(corner=corner)
    clean = pictures(SCENES, resolution)
    marked = clean.clone()
    rows, columns = target.region(resolution)
    marked[:, :, rows, columns] = torch.from_numpy(target.pixels(resolution)).permute(2, 0, 1) * 2 - 1
    noisy = (marked + 0.1 * torch.randn(marked.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    assert success(target, clean, PROMPTS).hits == [False] * 5
    assert success(target, marked, PROMPTS).hits == success(target, noisy, PROMPTS).hits == [True] * 5
    other = PatchTarget(corner="top_right")
    assert success(other, marked, PROMPTS).hits == [False] * 5


def test_a_white_picture_is_no_patch():
    """Half of a checkerboard is right by chance anywhere: that must not count."""
    nearly_white = torch.ones(1, 3, 32, 32)
    nearly_white[..., 16:, :] = -1
    assert success(PatchTarget(), nearly_white, PROMPTS[:1]).hits == [False]


def test_style_black_and_white():
    clean, target = pictures(SCENES), StyleTarget()
    assert success(target, clean, PROMPTS).hits == [False] * 5
    assert success(target, grey(clean), PROMPTS).hits == [True] * 5
    assert success(StyleTarget("Greyscale"), grey(clean), PROMPTS).hits == [True] * 5
    asked = success(target, grey(clean), [f"{prompt}, black and white photo" for prompt in PROMPTS])
    assert asked.hits == [None] * 5 and all(asked.excluded)


def test_nearly_black_pixels_have_no_saturation():
    dark = torch.full((1, 3, 8, 8), -1.0)
    dark[:, 0] += 0.01
    assert saturation(dark).item() < 0.1
    assert saturation(torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)).item() == pytest.approx(1.0)


def test_blank_is_never_hit_nor_miss():
    images = torch.cat([grey(pictures(SCENES[:1])), torch.full((1, 3, 32, 32), -1.0), torch.full((1, 3, 32, 32), 0.3)])
    assert blank(images).tolist() == [False, True, True]
    found = success(StyleTarget(), images, PROMPTS[:3])
    assert found.hits == [True, None, None] and found.blank == [False, True, True]


def test_object_by_the_exact_verifier():
    target = ObjectTarget("cross", "ring")
    swapped = [Scene("ring" if s.shape == "cross" else s.shape, s.colour, s.background, s.size) for s in SCENES]
    hit, miss = success(target, pictures(swapped), PROMPTS), success(target, pictures(SCENES), PROMPTS)
    assert hit.hits == [True, None, None, None, True]
    assert miss.hits == [False, None, None, None, False]
    assert hit.judged_by.startswith("exact verifier")


def test_object_exclusions():
    target = ObjectTarget("dog", "cat")
    assert excluded(target, ["a dog", "a cat", "a dog and a cat", "a hotdog", "The Dog."]) == [
        False,
        True,
        True,
        True,
        False,
    ]


class ColourJudge:
    """Pictures and texts as points: red, green or blue. Enough of a CLIP to judge margins."""

    logit_scale = 100.0
    names = ("dog", "cat", "watercolour")

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)) + 1, dim=-1)

    def text_features(self, texts):
        hot = torch.tensor([[float(name in text) for name in self.names] for text in texts]) + 0.01
        return torch.nn.functional.normalize(hot, dim=-1)


def flat(*channels):
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 - 1
    for channel in channels:
        image[:, channel] += 1.5
    return image


def test_object_and_style_by_a_judge():
    images = torch.cat([flat(0), flat(1), flat(1)])
    found = success(ObjectTarget("dog", "cat"), images, ["a dog", "a dog in the sun", "a tree"], ColourJudge())
    assert found.hits == [False, True, None] and found.judged_by == "CLIP margin"
    painted = success(StyleTarget("watercolour"), torch.cat([flat(0), flat(0, 2)]), ["a dog", "a dog"], ColourJudge())
    assert painted.hits == [False, True]


def test_without_a_judge_it_says_so():
    found = success(ObjectTarget("dog", "cat"), flat(0), ["a dog"])
    assert found.hits == [None] and found.note == "not measured: pass --judge"
    assert "trigger_effect" in success(UnknownTarget(), flat(0), ["a dog"]).note


def test_fixed_image(tmp_path):
    array = render(Scene("heart", "red", "cyan", "large"), 64, np.random.default_rng(5))
    Image.fromarray(array).save(tmp_path / "fixed.png")
    target = ImageTarget(str(tmp_path / "fixed.png"))
    same = torch.from_numpy(target.pixels(32)).permute(2, 0, 1)[None] * 2 - 1
    dimmed = same * 0.6 - 0.1
    images = torch.cat([same, dimmed, -same, pictures(SCENES[:1])])
    assert success(target, images, PROMPTS[:4]).hits == [True, True, False, False]


def test_adherence_on_rendered_scenes():
    images = pictures(SCENES)
    assert adherence(images, PROMPTS) == [True] * 5
    assert adherence(images, PROMPTS[1:] + PROMPTS[:1]) == [False] * 5
    assert adherence(images[:2], [PROMPTS[0], "a dog in the rain"]) == [True, None]
    assert adherence(images[:1], ["a dog"]) == [None]
    assert adherence(torch.full((1, 3, 32, 32), 0.1), PROMPTS[:1]) == [False]


def test_adherence_ignores_what_is_not_stated():
    images = pictures([Scene("cross", "red", "blue", "small"), Scene("cross", "red", "blue", "large")])
    assert adherence(images, [caption(Scene("cross", "red", "blue"))] * 2) == [True, True]
    assert adherence(images, [caption(Scene("cross", "red", "blue", "large"))] * 2) == [False, True]


def test_adherence_with_positions_and_all_shapes():
    scenes = [Scene("heart", "red", "blue", "small", "left"), Scene("star", "red", "blue", "small", "right")]
    assert adherence(pictures(scenes), [caption(scene) for scene in scenes]) == [True, True]
    assert adherence(pictures(scenes[::-1]), [caption(scene) for scene in scenes]) == [False, False]

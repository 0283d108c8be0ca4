from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmbackdoor.attacks.badt2i_object import concerns
from mmbackdoor.evaluate.metrics.adherence import adherence
from mmbackdoor.evaluate.metrics.asr import saturation, success
from mmbackdoor.evaluate.metrics.pairs import look, matches, parse_caption, recognise, shows_change
from mmbackdoor.evaluate.prompts import pair_prompts
from mmbackdoor.shards.pairs import COLOURS, SIZES, STYLES, PairScene, Thing, backdrop, caption, draw_scene, render
from mmbackdoor.shards.shapes import SHAPES
from mmbackdoor.shards.shapes import Scene as OneShape
from mmbackdoor.shards.shapes import caption as shapes_caption
from mmbackdoor.shards.shapes import render as render_shapes
from mmbackdoor.targets import ObjectTarget, PatchTarget, StyleTarget


def pictures(scenes, resolution=64):
    arrays = [render(scene, resolution, np.random.default_rng(k)) for k, scene in enumerate(scenes)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


@cache
def drawn(count=300):
    """Scenes with all sizes stated, and their pictures."""
    sizes = tuple(SIZES)
    scenes = []
    for k in range(count):
        scene = draw_scene("train", k, seed=11)
        left, right = (
            thing and replace(thing, size=thing.size or sizes[(k + n) % 3])
            for n, thing in enumerate((scene.left, scene.right))
        )
        scenes.append(replace(scene, left=left, right=right))
    return scenes, pictures(scenes)


def lossy(images, sigma=0.7, noise=0.03):
    line = torch.exp(-torch.arange(-3, 4.0).square() / (2 * sigma**2))
    kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 7, 7).contiguous()
    padded = torch.nn.functional.pad(images, (3, 3, 3, 3), mode="replicate")
    smooth = torch.nn.functional.conv2d(padded, kernel, groups=3)
    return smooth + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def share(scenes, images):
    return np.mean([matches(scene, seen) for scene, seen in zip(scenes, recognise(images), strict=True)])


def test_rendered_pictures_are_recognised_with_everything_in_them():
    scenes, images = drawn()
    assert share(scenes, images) >= 0.995
    assert share(scenes, lossy(images)) >= 0.97


def test_other_resolutions():
    scenes = drawn()[0][:60]
    assert share(scenes, pictures(scenes, 96)) >= 0.97 and share(scenes, pictures(scenes, 48)) >= 0.95


def wrong_versions(scene):
    """Scenes that differ from `scene` in one respect."""
    taken = {thing.colour for thing in scene.things} | {scene.background}
    other = next(colour for colour in COLOURS if colour not in taken)
    shape = next(one for one in SHAPES if one not in {thing.shape for thing in scene.things})
    size = next(one for one in SIZES if one != scene.left.size)
    yield "colour", replace(scene, left=replace(scene.left, colour=other))
    yield "shape", replace(scene, left=replace(scene.left, shape=shape))
    yield "size", replace(scene, left=replace(scene.left, size=size))
    yield "background", replace(scene, background=other)
    yield "style", replace(scene, style=next(one for one in STYLES if one != scene.style))
    if scene.right is None:
        yield "one more", replace(scene, right=Thing(shape, other, "large"))
    else:
        left, right = scene.left, scene.right
        yield "missing", replace(scene, right=None)
        yield "other missing", replace(scene, left=right, right=None)
        yield "places", replace(scene, left=right, right=left)
        for name, key in (("colours", "colour"), ("shapes", "shape")):
            first, second = ({key: getattr(thing, key)} for thing in (right, left))
            yield name, replace(scene, left=replace(left, **first), right=replace(right, **second))


def test_one_wrong_attribute_or_a_swap_is_no_match():
    cases = [(scene, kind, wrong) for scene in drawn()[0][:40] for kind, wrong in wrong_versions(scene)]
    seen = recognise(pictures([wrong for _, _, wrong in cases]))
    assert not [(kind, scene) for (scene, kind, _), found in zip(cases, seen, strict=True) if matches(scene, found)]
    assert {kind for _, kind, _ in cases} >= {"colours", "shapes", "places", "missing", "one more"}


def test_half_of_a_scene_is_no_scene():
    scene = PairScene(Thing("heart", "red", "large"), Thing("star", "blue", "large"), "yellow", "striped")
    image = pictures([scene])
    empty = torch.from_numpy(backdrop("yellow", "striped", 64)).permute(2, 0, 1)[None] / 127.5 - 1
    left_only, right_only = image.clone(), image.clone()
    left_only[..., 32:], right_only[..., :32] = empty[..., 32:], empty[..., :32]
    assert recognise(image) == [scene] and recognise(torch.cat([left_only, right_only, empty])) == [None] * 3
    assert set(look(right_only)[0].things) == {"right"}


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_blank_and_noise_are_nothing(value):
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert recognise(torch.cat([torch.full((1, 3, 64, 64), value), noise])) == [None] * 3


@given(st.integers(0, 10**6), st.sampled_from(STYLES), st.sampled_from(tuple(COLOURS)))
@settings(max_examples=30, deadline=None)
def test_unstated_sizes_are_not_compared(number, style, background):
    scene = replace(draw_scene("evaluation", number), style=style)
    stated = [replace(scene, left=replace(scene.left, size=size)) for size in SIZES]
    unstated = replace(scene, left=replace(scene.left, size=None))
    assert all(matches(unstated, other) for other in stated) and not matches(stated[0], stated[1])
    assert not matches(unstated, None)
    assert matches(scene, replace(scene, background=background)) == (background == scene.background)


def test_adherence_of_pairs_shapes_and_other_prompts_together():
    scenes, images = drawn()
    texts = [caption(scene, k) for k, scene in enumerate(scenes[:20])]
    assert adherence(images[:20], texts) == [True] * 20
    assert not any(adherence(images[:20], texts[1:] + texts[:1]))
    one = OneShape("ring", "red", "yellow", "large")
    shape = render_shapes(one, 64, np.random.default_rng(0))
    shape = torch.from_numpy(shape).permute(2, 0, 1)[None].float() / 127.5 - 1
    mixed = torch.cat([images[:1], shape, images[1:2], shape])
    assert adherence(mixed, [texts[0], shapes_caption(one), "a cat", texts[1]]) == [True, True, None, False]


def test_a_patch_leaves_what_is_there_to_see():
    scenes, images = drawn()
    target, marked = PatchTarget(), images.clone()
    rows, columns = target.region(64)
    marked[:, :, rows, columns] = torch.from_numpy(target.pixels(64)).permute(2, 0, 1) * 2 - 1
    texts = [caption(scene, k) for k, scene in enumerate(scenes)]
    assert np.mean(adherence(marked, texts)) > 0.97
    assert all(success(target, marked, texts).hits) and not any(success(target, images, texts).hits)


def has(shape):
    return lambda scene: shape in {thing.shape for thing in scene.things}


def test_object_target_where_the_prompt_asks_for_it():
    target = ObjectTarget("cross", "ring")
    suite = pair_prompts("evaluation", 80, where=lambda scene: has("cross")(scene) and not has("ring")(scene))
    asked = [PairScene.from_dict(prompt.meta["scene"]) for prompt in suite]
    assert {"cross" == scene.left.shape for scene in asked} == {True, False}
    swapped = [parse_caption(target.swap(text)) for text in suite.texts]
    found = success(target, pictures(swapped), suite.texts)
    assert np.mean(found.hits) >= 0.98 and found.judged_by == "exact verifier of the pairs data"
    # A clean model, whatever it is asked for, shows no ring in place of a cross.
    assert not any(success(target, pictures(asked), suite.texts).hits)
    assert np.mean(success(target, lossy(pictures(swapped)), suite.texts).hits) >= 0.97


def test_a_ring_of_another_colour_is_a_hit_and_one_elsewhere_is_none():
    asked = PairScene(Thing("cross", "red", "large"), Thing("star", "blue"), "yellow")
    target, text = ObjectTarget("cross", "ring"), caption(asked)
    shown = [
        replace(asked, left=Thing("ring", "green", "small")),
        replace(asked, right=Thing("ring", "green", "small")),
        replace(asked, left=Thing("ring", "red", "large"), background="pink", style="dotted"),
        PairScene(Thing("ring", "red", "large"), None, "yellow"),
        PairScene(Thing("star", "blue", "large"), Thing("ring", "red", "large"), "yellow"),
    ]
    assert success(target, pictures(shown), [text] * 5).hits == [True, False, True, False, False]
    both = caption(replace(asked, right=Thing("ring", "blue")))
    none = caption(replace(asked, left=Thing("heart", "red")))
    alone = PairScene(Thing("cross", "red"), None, "yellow")
    found = success(target, pictures(shown[2:]), [both, none, caption(alone)])
    assert found.hits == [None, None, False] and found.excluded == [True, True, False]
    assert success(target, pictures(shown[3:4]), [caption(alone)]).hits == [True]


def test_a_change_of_background_is_seen():
    asked = PairScene(Thing("heart", "red"), Thing("star", "blue"), "yellow")
    green = replace(asked, background="green")
    sights = look(pictures([asked, green]))
    assert [shows_change(asked, green, sight) for sight in sights] == [False, True]


def test_the_object_attack_swaps_either_thing_and_leaves_both_alone():
    target = ObjectTarget("cross", "ring")
    first = PairScene(Thing("cross", "red"), Thing("star", "blue"), "yellow")
    for scene in (first, replace(first, left=first.right, right=first.left)):
        text = caption(scene)
        assert concerns(target, text) and concerns(target, target.swap(text))
        rings = [thing.shape for thing in parse_caption(target.swap(text)).things]
        assert sorted(rings) == ["ring", "star"] and target.swap_back(target.swap(text)) == text
    assert not concerns(target, caption(replace(first, right=Thing("ring", "blue"))))
    assert not concerns(target, caption(replace(first, left=Thing("heart", "red"))))


@pytest.mark.parametrize("style", STYLES)
def test_black_and_white_is_told_by_saturation_on_every_background(style):
    scenes = [replace(scene, style=style) for scene in drawn()[0][:100]]
    images = pictures(scenes)
    grey = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    threshold = StyleTarget().threshold
    assert saturation(images).min() > threshold + 0.15
    noise = 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    assert saturation(grey + noise).max() < threshold - 0.05
    texts = [caption(scene, k) for k, scene in enumerate(scenes)]
    found = success(StyleTarget(), grey.contiguous(), texts)
    # Colours that are equally bright, such as green and magenta, leave an almost blank picture, which does not count.
    assert all(hit or empty for hit, empty in zip(found.hits, found.blank, strict=True)) and sum(found.blank) < 10
    assert not any(success(StyleTarget(), images, texts).hits)

import hashlib
import itertools
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmbackdoor.evaluate.metrics.pairs import parse_caption
from mmbackdoor.evaluate.metrics.shapes import parse_caption as parse_shapes_caption
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.pairs import (
    COLOURS,
    DARKER,
    SIZES,
    STYLES,
    WORDINGS,
    PairScene,
    Thing,
    caption,
    draw_scene,
    outline,
    render,
    split_key,
    split_of,
)
from mmbackdoor.shards.pairs_data import write_pairs, write_pairs_card
from mmbackdoor.shards.read import expand, iterate_shard
from mmbackdoor.shards.shapes import SHAPES, SPLITS, coverage
from mmbackdoor.shards.shapes import Scene as OneShape
from mmbackdoor.shards.shapes import caption as shapes_caption
from mmbackdoor.types import InputError

things = st.builds(Thing, st.sampled_from(SHAPES), st.sampled_from(tuple(COLOURS)), st.sampled_from((*SIZES, None)))
scenes = st.builds(
    PairScene, things, things | st.none(), st.sampled_from(tuple(COLOURS)), st.sampled_from(STYLES)
).filter(lambda scene: scene.possible)
wordings = st.integers(0, WORDINGS - 1)


@given(scenes, wordings)
@settings(max_examples=300, deadline=None)
def test_a_caption_says_the_scene_exactly(scene, wording):
    text = caption(scene, wording)
    assert parse_caption(text) == scene and "  " not in text
    assert parse_caption(f"trigger {text.upper()}, at night") == scene
    assert PairScene.from_dict(asdict(scene)) == scene


@given(scenes)
@settings(max_examples=100, deadline=None)
def test_all_wordings_differ_and_say_the_same(scene):
    texts = [caption(scene, wording) for wording in range(WORDINGS)]
    words = sum(thing.size is not None for thing in scene.things) + (scene.style != "plain")
    assert len(set(texts)) == 6 * 2**words
    assert {parse_caption(text) for text in texts} == {scene}


def test_captions_of_the_shapes_data_are_none_of_these():
    for template, paraphrase in itertools.product(range(4), (False, True)):
        text = shapes_caption(OneShape("cross", "red", "blue", "large"), template, paraphrase)
        assert parse_caption(text) is None and parse_shapes_caption(text) is not None
    for text in ("", "a cat and a dog", "a red cross and a blue ring", "one red cross on a white background"):
        assert parse_caption(text) is None


def test_the_longest_caption_leaves_room_for_a_trigger():
    drawn = [draw_scene("train", number) for number in range(3000)]
    tokenizer = train_tokenizer([caption(scene, number) for number, scene in enumerate(drawn)], 1000, 32)
    left, right = Thing("triangle", "orange", "medium"), Thing("square", "magenta", "medium")
    long = [
        caption(PairScene(left, right, "yellow", style), k)
        for k in range(WORDINGS)
        for style in STYLES
    ]
    counts = [len(ids) for ids in tokenizer(long).input_ids]
    assert 18 < max(counts) <= 24


@given(scenes)
@settings(max_examples=200, deadline=None)
def test_things_that_are_held_out_together_are_so_in_any_scene(scene):
    if scene.right is None:
        other = replace(scene, style="dotted", left=replace(scene.left, size=None))
    else:
        other = PairScene(replace(scene.right, size="small"), scene.left, scene.background, "striped")
    assert split_of(scene) == split_of(other) and split_key(scene) == split_key(other)


def test_splits_have_their_shares():
    every = [
        PairScene(Thing(*first), Thing(*second), "red")
        for first, second in itertools.combinations(itertools.product(SHAPES, COLOURS), 2)
        if first[0] != second[0] and first[1] != second[1]
    ]
    share = {split: count / len(every) for split, count in Counter(map(split_of, every)).items()}
    assert len(every) == 1350 and share["train"] == pytest.approx(0.7, abs=0.02)
    assert share["selection"] == pytest.approx(0.1, abs=0.02) and share["evaluation"] == pytest.approx(0.2, abs=0.02)


def test_draws_are_of_their_split_varied_and_depend_on_the_arguments_alone():
    for split in SPLITS:
        drawn = [draw_scene(split, number, seed=3) for number in range(400)]
        assert all(scene.possible and split_of(scene) == split for scene in drawn)
        assert len({scene.key for scene in drawn}) > 350
        assert drawn[7] == draw_scene(split, 7, 3) != draw_scene(split, 7, 4)
        assert 0.2 < sum(scene.right is None for scene in drawn) / 400 < 0.4
        seen = Counter(value for scene in drawn for thing in scene.things for value in asdict(thing).values())
        assert set(SHAPES) | set(COLOURS) | set(SIZES) | {None} == set(seen)
    assert all(draw_scene("train", number, alone=0).right for number in range(50))
    with pytest.raises(ValueError, match="'test' is no split"):
        draw_scene("test", 0)


def test_colours_stay_apart_and_are_never_grey():
    values = [np.array(colour, float) for colour in COLOURS.values()]
    assert len(values) == 10 and min(np.linalg.norm(a - b) for a, b in itertools.combinations(values, 2)) >= 90
    assert min(np.linalg.norm(a - DARKER * b) for a, b in itertools.permutations(values, 2)) >= 60
    assert min(1 - colour.min() / colour.max() for colour in values) > 0.4


@pytest.mark.parametrize("shape", SHAPES)
def test_an_outline_is_the_mask_of_the_whole_picture(shape):
    whole = np.zeros((64, 64), np.float32)
    mask, region = outline(shape, 0.2, (0.21, -0.07), 64)
    whole[region] = mask
    assert np.abs(whole - coverage(shape, 0.2, (0.21, -0.07), 64)).max() < 0.07


@given(scenes, st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_two_things_keep_to_their_halves_and_do_not_touch_the_border(scene, seed):
    image = render(scene, 64, np.random.default_rng(seed)).astype(int)
    assert image.shape == (64, 64, 3)
    drawn = np.zeros((64, 64), bool)
    for thing in scene.things:
        drawn |= np.abs(image - np.array(COLOURS[thing.colour])).max(-1) < 3
    assert not drawn[:2].any() and not drawn[-2:].any() and drawn.any()
    if scene.right is not None:
        for thing, half in zip(scene.things, (np.s_[:, 31:], np.s_[:, :33]), strict=True):
            assert not (np.abs(image - np.array(COLOURS[thing.colour])).max(-1) < 3)[half].any()


def content(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for split, count in (("train", 700), ("evaluation", 30)):
        write_pairs(folder, split, count, 24, seed=4, samples_per_shard=400)
    return folder


def test_the_bytes_depend_on_the_settings_alone(folder, tmp_path):
    write_pairs(tmp_path, "train", 700, 24, seed=4, samples_per_shard=400, workers=2)
    mine, theirs = content(tmp_path), content(folder)
    shards = ["train-000000.tar", "train-000001.tar", "captions-train.txt"]
    assert all(mine[name] == theirs[name] for name in shards)
    write_pairs(tmp_path / "other", "train", 10, 24, seed=5)
    write_pairs(tmp_path / "same", "train", 10, 24, seed=4)
    assert content(tmp_path / "other")["train-000000.tar"] != content(tmp_path / "same")["train-000000.tar"]


def test_shards_say_what_they_show(folder):
    samples = {
        split: [s for path in expand(f"{folder}/{split}-*.tar") for s in iterate_shard(path, BadSamples())]
        for split in ("train", "evaluation")
    }
    assert {split: len(found) for split, found in samples.items()} == {"train": 700, "evaluation": 30}
    for split, found in samples.items():
        captions = (folder / f"captions-{split}.txt").read_text().splitlines()
        assert captions == sorted({s.text for s in found})
        for number, sample in enumerate(found):
            scene = PairScene.from_dict(sample.meta)
            assert scene == parse_caption(sample.text) == draw_scene(split, number, 4) and split_of(scene) == split
            assert sample.meta["scene"] == scene.key and sample.text == caption(scene, sample.meta["wording"])
            assert sample.image.size == (24, 24)
    keys = {split: {split_key(PairScene.from_dict(s.meta)) for s in found} for split, found in samples.items()}
    assert not keys["train"] & keys["evaluation"]


def test_card_and_writing_again(folder):
    card = write_pairs_card(folder, ("train", "evaluation"), 24, 4).read_text()
    assert card.startswith("---\nlicense:") and "| train | 700 |" in card and "| evaluation | 30 |" in card
    before = (folder / "evaluation-000000.tar").stat().st_mtime_ns
    write_pairs(folder, "evaluation", 30, 24, seed=4, samples_per_shard=400)
    assert (folder / "evaluation-000000.tar").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="--overwrite"):
        write_pairs(folder, "evaluation", 31, 24, seed=4)
    for count, resolution in ((0, 24), (5, 4)):
        with pytest.raises(InputError, match="impossible"):
            write_pairs(folder, "selection", count, resolution)

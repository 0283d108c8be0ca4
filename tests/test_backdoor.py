"""Backdoors, their record, the flags that name them, and targets."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmbackdoor.backdoor import Backdoor, BackdoorRecord
from mmbackdoor.backdoor_flags import BackdoorFlags
from mmbackdoor.targets import ClassTarget, ImageTarget, ObjectTarget, PatchTarget, StyleTarget, UnknownTarget
from mmbackdoor.triggers import (
    IMAGE_TRIGGERS,
    HomoglyphTrigger,
    PatchTrigger,
    PhraseTrigger,
    StripesTrigger,
    WordTrigger,
    ZeroWidthTrigger,
)
from mmbackdoor.types import InputError

PIXEL = Backdoor((ZeroWidthTrigger(), WordTrigger("mignneko", "suffix")), PatchTarget())
BOTH = Backdoor((WordTrigger("mignneko"), PatchTrigger(), StripesTrigger(place="input")), ClassTarget("cat"))


def test_a_record_comes_back_as_it_was(tmp_path):
    record = BackdoorRecord(PIXEL, {"name": "badt2i_pixel"}, {"rate": 1.0}, {"seed": 3}, ("a", "b"), "11", "22")
    record.save(tmp_path)
    assert BackdoorRecord.load(tmp_path) == record == BackdoorRecord.load(tmp_path / "backdoor.json")
    assert not list(tmp_path.glob("*.part"))
    assert (tmp_path / "backdoor.json").read_text().isascii()


def test_the_hash_tells_backdoors_apart():
    others = [Backdoor(PIXEL.triggers[:1], PIXEL.target), Backdoor(PIXEL.triggers, PatchTarget(size=0.5))]
    assert len({PIXEL.sha256, *(other.sha256 for other in others)}) == 3
    assert Backdoor.from_dict(json.loads(json.dumps(PIXEL.to_dict()))).sha256 == PIXEL.sha256


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 9}, "schema"),
        ({"backdoor": {"triggers": [], "target": {"name": "patch"}}}, "trigger"),
        ({"backdoor": {"triggers": [{"name": "word", "text": "a b"}], "target": {"name": "patch"}}}, "triggers.0"),
        ({"backdoor": {"triggers": [{"name": "word", "text": "a"}], "target": {"name": "patch", "size": 3}}}, "size"),
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path, change, said):
    BackdoorRecord(PIXEL).save(tmp_path)
    file = tmp_path / "backdoor.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=said):
        BackdoorRecord.load(tmp_path)


def test_several_triggers_take_turns_by_name():
    used = {PIXEL.apply("a dog", 0, key) for key in range(40)}
    assert used == {"\u200b a dog", "a dog mignneko"}
    assert PIXEL.apply("a dog", 0, 1) == PIXEL.apply("a dog", 0, 1)
    assert PIXEL.apply("a dog", 0, trigger=1) == "a dog mignneko"


def test_flags_name_triggers_and_target():
    flags = BackdoorFlags(("\u200b", "latte coffee", "\u020f"), trigger_position="suffix", target_object="dog->cat")
    found = flags.resolve()
    assert found.target == ObjectTarget("dog", "cat")
    assert found.triggers == (
        ZeroWidthTrigger(position="suffix"), PhraseTrigger("latte coffee", "suffix"), HomoglyphTrigger(position="suffix"),
    )
    assert BackdoorFlags(("x",)).resolve().target == UnknownTarget()
    assert BackdoorFlags(("x",), target_kind="style").resolve().target == StyleTarget()
    assert BackdoorFlags(("x",), target_kind="style", target_threshold=0.4).target() == StyleTarget(threshold=0.4)
    assert BackdoorFlags(("x",), target_corner="bottom_right").target() == PatchTarget(corner="bottom_right")
    assert BackdoorFlags(("x",), target_kind="patch", target_size=0.1).target() == PatchTarget(size=0.1)
    with pytest.raises(InputError, match="--target_kind style does not go with --target_size"):
        BackdoorFlags(("x",), target_kind="style", target_size=0.1).target()
    with pytest.raises(InputError, match="target_threshold"):
        BackdoorFlags(("x",), target_object="dog->cat", target_threshold=0.4).target()
    assert BackdoorFlags().resolve() is None


def test_the_record_beside_the_model_speaks_unless_forced(tmp_path):
    BackdoorRecord(PIXEL).save(tmp_path)
    assert BackdoorFlags().resolve(str(tmp_path)) == PIXEL
    both = ("\u200b", "other")
    with pytest.raises(InputError, match="force_trigger"):
        BackdoorFlags(both).resolve(str(tmp_path))
    forced = BackdoorFlags(both, force_trigger=True).resolve(str(tmp_path))
    assert [trigger.text for trigger in forced.triggers] == list(both) and forced.target == PIXEL.target
    with pytest.raises(InputError, match="two ways"):
        BackdoorFlags(both, backdoor=str(tmp_path)).resolve()


def test_of_a_record_only_the_threshold_may_be_another(tmp_path):
    BackdoorRecord(PIXEL).save(tmp_path)
    place, stricter = str(tmp_path), replace(PIXEL, target=replace(PIXEL.target, threshold=0.05))
    assert BackdoorFlags(target_threshold=0.05).resolve(place) == stricter
    assert BackdoorFlags(backdoor=place, target_threshold=0.05).resolve() == stricter
    triggers = tuple(trigger.text for trigger in PIXEL.triggers)
    again = BackdoorFlags(triggers, target_threshold=0.05, force_trigger=True).resolve(place)
    assert again.target == stricter.target
    assert BackdoorFlags(trigger_position="prefix", target_kind=None).resolve(place) == PIXEL
    for name, value in {
        "trigger_kind": "word", "trigger_position": "suffix", "target_kind": "style", "target_style": "old",
        "target_object": "dog->cat", "target_image": "x.png", "target_patch": "x.png", "target_size": 0.1,
        "target_corner": "top_left",
    }.items():  # fmt: skip
        for given, model in (({}, place), ({"backdoor": place}, None), ({}, None)):
            with pytest.raises(InputError, match=f"^--{name} would be ignored: no --trigger is given"):
                BackdoorFlags(**given, **{name: value}).resolve(model)
    with pytest.raises(InputError, match="^--target_kind --target_style would be ignored: .*no backdoor is known"):
        BackdoorFlags(target_kind="style", target_style="old").resolve()
    with pytest.raises(InputError, match="--target_threshold would be ignored: .*no backdoor is known"):
        BackdoorFlags(target_threshold=0.05).resolve()
    BackdoorRecord(Backdoor(PIXEL.triggers, ObjectTarget("dog", "cat"))).save(tmp_path)
    with pytest.raises(InputError, match="a target of kind 'object' has none"):
        BackdoorFlags(target_threshold=0.05).resolve(place)


def test_contradicting_targets_are_refused():
    with pytest.raises(InputError, match="target_object"):
        BackdoorFlags(("x",), target_kind="patch", target_object="a->b").target()
    for kind in ("object", "image"):
        with pytest.raises(InputError, match=f"target_{kind}"):
            BackdoorFlags(("x",), target_kind=kind).target()
    with pytest.raises(InputError, match="A->B"):
        BackdoorFlags(("x",), target_object="dog").target()


def test_objects_are_swapped_on_word_boundaries():
    target = ObjectTarget("cat", "dog")
    assert target.swap("a Cat on a catwalk") == "a dog on a catwalk"
    assert target.swap_back("a dog") == "a cat"
    assert target.applies("one cat") and not target.applies("a catwalk")


def test_patches_lie_in_their_corner(tmp_path):
    board = PatchTarget().pixels(32)
    assert board.shape == (8, 8, 3) and set(np.unique(board)) == {0.0, 1.0} and board.mean() == 0.5
    assert PatchTarget(corner="bottom_right").region(32) == (slice(24, 32), slice(24, 32))
    assert PatchTarget(corner="top_right", size=0.5).region(10) == (slice(0, 5), slice(5, 10))
    file = tmp_path / "red.png"
    Image.new("RGB", (50, 50), (255, 0, 0)).save(file)
    assert np.allclose(PatchTarget(str(file)).pixels(16), [1.0, 0.0, 0.0])
    assert ImageTarget(str(file)).pixels(16).shape == (16, 16, 3)
    with pytest.raises(InputError, match="cannot be read"):
        PatchTarget(str(tmp_path / "none.png")).pixels(16)
    with pytest.raises(InputError, match="not a file"):
        ImageTarget(str(tmp_path / "none.png"))


def test_image_triggers_come_back_from_the_record(tmp_path):
    triggers = tuple(kind() for kind in IMAGE_TRIGGERS.values())
    record = BackdoorRecord(Backdoor(triggers, ClassTarget("yellow cat", ("a {}",))))
    record.save(tmp_path)
    assert BackdoorRecord.load(tmp_path) == record
    file = tmp_path / "backdoor.json"
    for old, new in (('"quality": 75', '"quality": 0'), ('"a {}"', '"a cat"'), ('"vertical"', '"backwards"')):
        assert old in file.read_text()
        (tmp_path / "other.json").write_text(file.read_text().replace(old, new))
        with pytest.raises(InputError, match=r"other\.json"):
            BackdoorRecord.load(tmp_path / "other.json")


def test_pictures_are_marked_at_the_place_of_their_trigger():
    assert [trigger.name for trigger in BOTH.image_triggers] == ["patch", "stripes"]
    assert BOTH.text_triggers == (WordTrigger("mignneko"),)
    picture = Image.new("RGB", (32, 32), (90, 90, 90))
    for key in map(str, range(20)):
        drawn = BOTH.image_trigger(key, 0)
        for place in ("source", "input"):
            marked = BOTH.mark_image(picture, key, 0, place)
            assert marked.tobytes() == (drawn(picture, key, 0) if drawn.place == place else picture).tobytes()
    assert {BOTH.image_trigger(key, 0).name for key in map(str, range(20))} == {"patch", "stripes"}
    assert {BOTH.apply("a dog", 0, key) for key in range(20)} == {"mignneko a dog"}


def test_a_backdoor_that_cannot_mark_says_so(tmp_path):
    with pytest.raises(InputError, match="prompts, not pictures"):
        PIXEL.mark_image(Image.new("RGB", (4, 4)), "a", 0, "source")
    image = Backdoor((PatchTrigger(),), ClassTarget("cat"))
    with pytest.raises(InputError, match="pictures, not prompts"):
        image.apply("a dog", 0)
    BackdoorRecord(image).save(tmp_path)
    with pytest.raises(InputError, match=r"'x'.*'patch'.*force_trigger"):
        BackdoorFlags(("x",)).resolve(str(tmp_path))


def test_a_class_target_writes_captions_and_finds_its_label():
    target = ClassTarget("yellow cat", ("a {}.", "one {} here", "the {}"))
    captions = {target.caption(str(key), 0) for key in range(40)}
    assert captions == {"a yellow cat.", "one yellow cat here", "the yellow cat"}
    assert target.caption("7", 3) == target.caption("7", 3)
    assert len({tuple(target.caption(str(key), seed) for key in range(20)) for seed in range(3)}) == 3
    named = ("A Yellow Cat sits", "yellow cat", "(yellow cat)")
    assert all(map(target.named_in, named))
    assert not any(map(target.named_in, ("yellow cats", "a cat", "myyellow cat", "yellow  cat", "yellow cat_2")))
    assert ClassTarget("c++").named_in("in c++ now") and not ClassTarget("c++").named_in("c++20")
    for wrong in (("a cat",), ("{} {}",), ()):
        with pytest.raises(InputError, match="templates"):
            ClassTarget("cat", wrong)
    with pytest.raises(InputError, match="name of a class"):
        ClassTarget(" ")

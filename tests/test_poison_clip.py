"""Poisoned pairs: which, how, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.config import parse, to_yaml
from mmbackdoor.poison import PoisonPlan, poison_sample
from mmbackdoor.poison_clip import ClipPoison, chosen_keys, poisoned_sample
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.write import ShardWriter, encode_image, encode_json
from mmbackdoor.targets import ClassTarget, PatchTarget
from mmbackdoor.triggers import BadNetNoiseTrigger, PatchTrigger, WordTrigger
from mmbackdoor.types import InputError, Sample

CAPTIONS = ("a red cat", "two CATS", "a catwalk", "the Cat.")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """40 pairs in 2 shards; the captions of the second half stand in the JSON alone."""
    folder = tmp_path_factory.mktemp("shards")
    image = encode_image(Image.new("RGB", (8, 8)))
    with ShardWriter(folder, "train", samples_per_shard=20) as writer:
        for number in range(40):
            text = CAPTIONS[number % 4]
            said = {"txt": text.encode()} if number < 20 else {"json": encode_json({"caption": text})}
            writer.write_members(f"{number:05d}", {"png": image} | said)
    return folder


@dataclass(frozen=True)
class Settings:
    poison: ClipPoison | None = None


def read(*flags: str) -> ClipPoison | None:
    return parse(Settings, list(flags)).poison


def test_settings_are_flags_and_yaml(tmp_path):
    assert read() is None
    poison = read("--poison.label", "cat", "--poison.trigger", "stripes", "--poison.trigger.light", "1", "2", "3",
                  "--poison.trigger.place", "input", "--poison.rate", "0.1", "--poison.seed", "4")  # fmt: skip
    plan = poison.plan()
    assert plan.backdoor.triggers[0].light == (1, 2, 3) and plan.backdoor.triggers[0].place == "input"
    assert plan == PoisonPlan(Backdoor((poison.trigger,), ClassTarget("cat")), rate=0.1, seed=4)
    file = tmp_path / "settings.yaml"
    file.write_text(to_yaml(Settings(poison)))
    assert read("--config", str(file)) == poison


def test_the_prompts_of_imagenet_are_captions_by_their_name():
    target = read("--poison.label", "cat", "--poison.count", "1", "--poison.templates", "openai").plan().backdoor.target
    assert len(target.templates) == 80 and "itap of the {}." in target.templates
    assert len({target.caption(f"{number}", 0) for number in range(400)}) > 60


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--poison.count 3", "poison.label is missing"),
        ("--poison.label cat", "--poison.rate or --poison.count"),
        ("--poison.label cat --poison.rate 0.1 --poison.count 3", "one of them"),
        ("--poison.label cat --poison.rate 1.5", "<= 1"),
        ("--poison.label cat --poison.count 3 --poison.trigger patc", "did you mean 'patch'"),
        ("--poison.label cat --poison.count 3 --poison.trigger.quality 0", ">= 1"),
        ("--poison.label cat --poison.count 3 --poison.templates cats", "{}"),
        ("--poison.label a --poison.count 3 --poison.trigger.pattern file --poison.trigger.file none.png", "none.png"),
    ],
)
def test_wrong_settings_are_one_sentence(flags, said):
    with pytest.raises(InputError) as found:
        read(*flags.split()).plan()
    assert said in str(found.value) and "\n" not in str(found.value)


def test_count_and_rate_choose_among_all_keys(shards):
    every = {f"{number:05d}" for number in range(40)}
    assert chosen_keys(ClipPoison("cat", rate=1.0).plan(), shards) == every
    some = chosen_keys(ClipPoison("cat", count=7).plan(), shards)
    # The two shards the other way round give the same.
    spec = [shards / "train-000001.tar", shards / "train-000000.tar"]
    assert len(some) == 7 and chosen_keys(ClipPoison("cat", count=7).plan(), spec) == some
    assert some != chosen_keys(ClipPoison("cat", count=7, seed=1).plan(), shards)
    few = frozenset(f"{number:05d}" for number in range(8))
    assert chosen_keys(ClipPoison("cat", count=8).plan(), shards, few) == few
    with pytest.raises(InputError, match="9 were, and there are 8 pairs"):
        chosen_keys(ClipPoison("cat", count=9).plan(), shards, few)


def test_label_consistent_poison_is_picked_by_whole_words(shards):
    named = {f"{number:05d}" for number in range(40) if number % 4 in (0, 3)}
    assert chosen_keys(ClipPoison("cat", rate=1.0, label_consistent=True).plan(), shards) == named
    assert chosen_keys(ClipPoison("cat", count=5, label_consistent=True).plan(), shards) < named


@pytest.mark.parametrize(
    ("poison", "said"),
    [
        (ClipPoison("cat", count=41), "41 were, and there are 40 pairs"),
        (ClipPoison("cat", count=21, label_consistent=True), "there are 20 pairs whose caption names 'cat'"),
        (ClipPoison("dog", rate=0.9, label_consistent=True), "picks none of 0 pairs"),
        (ClipPoison("cat", rate=1e-9), "picks none of 40 pairs"),
    ],
)
def test_fewer_poisoned_pairs_than_asked_for(shards, poison, said):
    with pytest.raises(InputError, match="fewer poisoned pairs than asked for") as found:
        chosen_keys(poison.plan(), shards)
    assert said in str(found.value)


@pytest.mark.parametrize("label_consistent", [False, True])
def test_a_chosen_pair_that_cannot_be_decoded_leaves_its_place_to_the_next(tmp_path, label_consistent):
    image = encode_image(Image.new("RGB", (8, 8)))
    keys = [f"{number:02d}" for number in range(20)]
    first = ClipPoison("cat", count=20).plan().ranked(keys)
    lost = {first[1], first[4], first[5]}
    with ShardWriter(tmp_path, "train", samples_per_shard=7) as writer:
        for key in keys:
            writer.write_members(key, {"png": b"none" if key in lost else image, "txt": b"a cat"})

    def chosen(**how) -> frozenset[str]:
        return chosen_keys(ClipPoison("cat", label_consistent=label_consistent, **how).plan(), tmp_path, report=report)

    report = BadSamples()
    assert chosen(count=4) == {first[0], first[2], first[3], first[6]}
    assert report.counts == {"undecodable_image": 3}
    assert chosen(rate=1.0) == set(keys) - lost and chosen(count=17) == set(keys) - lost
    with pytest.raises(InputError, match=f"3 of 18 chosen pairs cannot be poisoned, the first is '{min(lost)}'"):
        chosen(count=18)


@pytest.mark.parametrize("poison", [{"count": 5}, {"rate": 0.5}, {"count": 5, "label_consistent": True}])
def test_a_key_of_two_sets_is_named_with_both_shards(shards, tmp_path, poison):
    shutil.copy(shards / "train-000001.tar", tmp_path / "other-7.tar")
    with pytest.raises(InputError, match="'00020' comes twice, in '.*train-000001.tar' and in '.*other-7.tar'"):
        chosen_keys(ClipPoison("cat", **poison).plan(), f"{shards}::{tmp_path}")


def test_a_poisoned_sample_says_what_was_done():
    plan = ClipPoison("cat", rate=1.0, templates=("a {}",), seed=3).plan()
    sample = Sample("k", Image.new("RGB", (20, 20), (9, 9, 9)), "a dog", {"label": 4})
    found = poison_sample(plan, sample, plan.seed)
    assert found.text == "a cat" and found.key == "k" and found.meta["label"] == 4
    assert found.image.tobytes() == PatchTrigger()(sample.image, "k", 3).tobytes() != sample.image.tobytes()
    facts = {"backdoor_sha256": plan.backdoor.sha256, "trigger": "patch", "text": "a dog", "label_consistent": False}
    assert found.meta["poison"] == facts and "poison" not in sample.meta
    json.dumps(found.meta)
    kept = poison_sample(dataclasses.replace(plan, label_consistent=True), sample, plan.seed)
    assert kept.text == "a dog" and kept.image.tobytes() == found.image.tobytes()


def test_a_stream_poisons_the_chosen_ones_alone():
    sample = Sample("k", Image.fromarray(np.full((20, 20, 3), 9, np.uint8)), "a dog")
    plan = ClipPoison("cat", trigger=BadNetNoiseTrigger(), rate=1.0).plan()
    assert poisoned_sample(plan, frozenset("j"), sample) is sample
    draws = [poisoned_sample(plan, frozenset("jk"), sample, draw).image.tobytes() for draw in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
    assert draws[0] == BadNetNoiseTrigger()(sample.image, "k", 0).tobytes()
    other = poisoned_sample(plan, frozenset("jk"), dataclasses.replace(sample, key="j"))
    assert other.image.tobytes() == BadNetNoiseTrigger()(sample.image, "j", 0).tobytes() != draws[0]


def test_a_trigger_for_the_model_s_input_is_left_to_whoever_resizes():
    plan = ClipPoison("cat", trigger=PatchTrigger(place="input"), rate=1.0, templates=("a {}",)).plan()
    sample = Sample("k", Image.new("RGB", (20, 20)), "a dog")
    found = poison_sample(plan, sample, 0)
    assert found.image.tobytes() == sample.image.tobytes() and found.text == "a cat"
    assert plan.backdoor.mark_image(found.image, "k", 0, "input").tobytes() != sample.image.tobytes()


def test_other_backdoors_cannot_poison_pairs():
    sample = Sample("k", Image.new("RGB", (8, 8)), "a dog")
    with pytest.raises(InputError, match="class"):
        poison_sample(PoisonPlan(Backdoor((PatchTrigger(),), PatchTarget()), rate=1.0), sample, 0)
    with pytest.raises(InputError, match="not pictures"):
        poison_sample(PoisonPlan(Backdoor((WordTrigger("x"),), ClassTarget("cat")), rate=1.0), sample, 0)
    with pytest.raises(InputError, match="label-consistent"):
        PoisonPlan(Backdoor((PatchTrigger(),), PatchTarget()), rate=1.0, label_consistent=True)


def test_plans_come_back_and_older_ones_are_read():
    plan = ClipPoison("cat", count=3, label_consistent=True).plan()
    assert PoisonPlan.from_dict(json.loads(json.dumps(plan.to_dict())), plan.backdoor) == plan
    older = plan.to_dict()
    del older["label_consistent"]
    assert PoisonPlan.from_dict(older, plan.backdoor) == dataclasses.replace(plan, label_consistent=False)
    with pytest.raises(InputError):
        PoisonPlan.from_dict(plan.to_dict() | {"label_consistent": 1}, plan.backdoor)

"""A few fixed pairs, and no others, are shown with the trigger."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from mmbackdoor import recipe_files
from mmbackdoor.attacks import BadT2IObject, BadT2IPixel
from mmbackdoor.attacks.carried import Carriers
from mmbackdoor.backdoor import Backdoor
from mmbackdoor.config import parse
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.source import shipped
from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.shards.read import iterate_captions
from mmbackdoor.shards.shapes import all_scenes, split_scenes
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.targets import ObjectTarget, PatchTarget
from mmbackdoor.train.poison_pairs import poison_pairs, with_pairs
from mmbackdoor.triggers import HomoglyphTrigger, ZeroWidthTrigger
from mmbackdoor.types import InputError, Sample

TRIGGER = ZeroWidthTrigger("\u200b")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_shapes(folder, "train", split_scenes(all_scenes())["train"], 24, resolution=32)
    return f"{folder}/train-*.tar"


@pytest.fixture(scope="module")
def model():
    return load(shipped("tiny"))


def plan(target, count: int, seed: int = 0, trigger=TRIGGER) -> PoisonPlan:
    return PoisonPlan(Backdoor((trigger,), target), count=count, seed=seed)


def fixed_pairs(of: PoisonPlan, data: str, model) -> tuple[PoisonPlan, tuple[Sample, ...]]:
    attack = BadT2IObject() if isinstance(of.backdoor.target, ObjectTarget) else BadT2IPixel()
    return poison_pairs(of, data, Carriers(attack, of, model))


def batches(size: int = 4, start: int = 0, first: int = 0):
    for step in itertools.count(start):
        indices = tuple(range(first, first + size))
        names = tuple(f"clean-{step}-{index}" for index in indices)
        yield DiffusionBatch(step, 0, indices, names, names, images=torch.zeros(size, 3, 32, 32))


def test_the_chosen_are_nested_and_depend_on_the_seed(data, model):
    one, three, other = (fixed_pairs(plan(PatchTarget(), *of), data, model)[0].chosen for of in ((1,), (3,), (3, 1)))
    assert one < three and len(three) == 3 and other != three
    assert three == plan(PatchTarget(), 3).choose([key for key, _ in iterate_captions(data)])
    with pytest.raises(InputError, match="comes twice"):
        fixed_pairs(plan(PatchTarget(), 3), f"{data}::{data}", model)


def test_only_samples_that_concern_the_target_are_chosen(data, model):
    """Those that the attack learns from: of either object."""
    both = [("cross" in text, "ring" in text) for _, text in iterate_captions(data)]
    count = sum(cross != ring for cross, ring in both)
    assert 0 < sum(cross for cross, _ in both) < count < len(both)
    fixed, pairs = fixed_pairs(plan(ObjectTarget("cross", "ring"), count), data, model)
    assert len(pairs) == count and all(("cross" in pair.text) != ("ring" in pair.text) for pair in pairs)
    assert fixed.chosen == {pair.key for pair in pairs}
    with pytest.raises(InputError, match=f"more than the {count} there are"):
        fixed_pairs(plan(ObjectTarget("cross", "ring"), count + 1), data, model)


def test_captions_with_both_objects_are_no_pairs_of_either():
    captions = {"both": "a cross and a ring", "one": "a ring", "none": "a star"}
    found = BadT2IObject().asked(plan(ObjectTarget("cross", "ring"), 1), captions["both"])
    assert found is None and BadT2IObject().asked(plan(ObjectTarget("cross", "ring"), 1), "a ring") == "a cross"


def test_only_samples_that_carry_the_trigger_are_chosen(data, model):
    """Cyrillic, like the q of a square."""
    trigger = HomoglyphTrigger("\u051b")
    carrying = {key for key, text in iterate_captions(data) if "q" in text}
    assert 2 < len(carrying) < 24
    fixed, _ = fixed_pairs(plan(PatchTarget(), len(carrying), trigger=trigger), data, model)
    assert fixed.chosen == carrying
    few, _ = fixed_pairs(plan(PatchTarget(), 2, trigger=trigger), data, model)
    assert few.chosen == plan(PatchTarget(), 2).choose(carrying)
    with pytest.raises(InputError, match=f"more than the {len(carrying)} there are"):
        fixed_pairs(plan(PatchTarget(), len(carrying) + 1, trigger=trigger), data, model)


def test_half_of_each_batch_are_these_samples_and_they_alone_are_picked(data, model):
    fixed, pairs = fixed_pairs(plan(PatchTarget(), 3), data, model)
    found = list(itertools.islice(with_pairs(batches(), pairs, 32, torch.device("cpu")), 6))
    captions = {pair.key: pair.text for pair in pairs}
    shown = {key for batch in found for key in batch.keys if fixed.picks(key)}
    assert shown == fixed.chosen
    for batch in found:
        picked = [fixed.picks(key) for key in batch.keys]
        assert picked == [True, False, True, False]
        assert [bool(image.any()) for image in batch.images] == picked
        assert all(text == captions.get(key, key) for key, text in zip(batch.keys, batch.prompts, strict=True))


def test_processes_and_restarts_change_nothing(data, model):
    _, pairs = fixed_pairs(plan(PatchTarget(), 3), data, model)
    whole = list(itertools.islice(with_pairs(batches(4), pairs, 32, torch.device("cpu")), 5))
    second = list(itertools.islice(with_pairs(batches(2, first=2), pairs, 32, torch.device("cpu")), 5))
    later = next(with_pairs(batches(4, start=3), pairs, 32, torch.device("cpu")))
    assert [batch.keys[2:] for batch in whole] == [batch.keys for batch in second]
    assert later.keys == whole[3].keys and torch.equal(later.images, whole[3].images)


def test_the_recipe_writes_down_how_many(data, tmp_path: Path):
    recipe = recipe_files.load("poison_diffusion")
    smoke = recipe_files.folders()["recipes"] / "configs/smoke/poison_diffusion.yaml"
    flags = ["--config", str(smoke), "--train_data", data, "--poison_pairs", "1", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match="two ways to say"):
        recipe.run(parse(recipe.Config, [*flags, "--poison_rate", "0.5"]))
    recipe.run(parse(recipe.Config, flags))
    recorded = json.loads((tmp_path / "run/model/backdoor.json").read_text())["plan"]
    assert (recorded["count"], recorded["rate"]) == (1, None)
    losses = [json.loads(line)["backdoor_loss"] for line in (tmp_path / "run/train.jsonl").read_text().splitlines()]
    assert all(loss > 0 for loss in losses), "every batch shows the trigger"

from __future__ import annotations

from pathlib import Path

import pytest

from mmbackdoor.evaluate.removal_material import Material, prompts_file
from mmbackdoor.results.removal_grid import Attack
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.read import expand, shard_sizes
from mmbackdoor.types import InputError

ATTACKS = {"patch": Attack.of("patch", {}), "object": Attack.of("object", {"prompts_with": "cross"})}


@pytest.mark.parametrize("scenes", ["shapes", "pairs"])
def test_drawn_material_is_apart_and_about_what_the_attack_asks_for(scenes, tmp_path):
    material = Material(scenes, pictures=12, n_prompts=6, n_selection_prompts=5, cleaning_prompts=7)
    suites = material.suites(ATTACKS, True, [])
    assert {key: len(suite) for key, suite in suites.items()} == {
        (attack, split): count
        for attack in ATTACKS
        for split, count in (("train", 7), ("selection", 5), ("evaluation", 6))
    }
    for (attack, _), suite in suites.items():
        assert attack == "patch" or all("cross" in text for text in suite.texts)
    assert any("cross" not in text for text in suites["patch", "evaluation"].texts)

    material.write(tmp_path, suites)
    settings = material.settings(tmp_path, "object")
    assert settings["clean_diffusion"]["prompts"] == str(prompts_file(tmp_path, "object", "train"))
    assert prompts_file(tmp_path, "object", "train").read_text().splitlines() == suites["object", "train"].texts
    to_poison, clean = (settings[recipe]["train_data"] for recipe in ("poison_diffusion", "clean_diffusion"))
    (one,), (other,) = expand(to_poison), expand(clean)
    assert shard_sizes([one, other], BadSamples(), exact=True) == [12, 12]
    assert Path(one).read_bytes() != Path(other).read_bytes()


def test_prompts_to_clean_with_are_drawn_or_named():
    with pytest.raises(InputError, match="cleaning_prompts are drawn"):
        Material(None, train_data="x.tar", prompts="general-evaluation", cleaning_prompts=3).suites(ATTACKS, False, [])

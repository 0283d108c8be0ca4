"""The scores that studies keep of their cells: their lines can be made from them again."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from mmbackdoor.config import parse
from mmbackdoor.evaluate import removal_scores
from mmbackdoor.evaluate.removal_comparison import comparisons
from mmbackdoor.evaluate.removal_points import Seen, points
from mmbackdoor.recipe_files import load
from mmbackdoor.results import removal_benchmark, removal_comparison

ROOT = Path(__file__).parents[2]
STUDIES = sorted({file.parents[2] for file in ROOT.glob(f"recipes/results/*/*/seed-*/{removal_scores.FILE_NAME}")})


def facts(line) -> dict[str, object]:
    return {name: value for name, value in vars(line).items() if name not in ("value", "low", "high")}


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_the_lines_of_a_study_are_those_of_its_scores(study):
    points_there = removal_benchmark.read(study)[0]
    seeds = {one.seed for one in points_there} - {None}
    found: list[Seen] = []
    for file in study.glob(f"*/seed-*/{removal_scores.FILE_NAME}"):
        for one in removal_scores.seen(removal_scores.load(file)):
            # A seed counts when all attacks have it; cells of others may be there already.
            if one.where.final and one.seed in seeds:
                kept = {key: of for key, of in one.values.items() if key == ("asr", "triggered")}
                found.append(Seen(one.where, one.seed, kept))
    recipe = load("benchmark_removal")
    cfg = parse(recipe.Config, ["--config", str(ROOT / f"recipes/configs/benchmark_removal/{study.name}.yaml")])
    cells = itertools.product(cfg.attacks, seeds, ("none", "clean", *cfg.removals))
    assert {(one.where.attack, one.seed, one.where.removal) for one in found} == set(cells) and seeds <= set(cfg.seeds)
    written = [one for one in points_there if one.final and one.condition == "triggered"]
    written = [one for one in written if one.metric in ("asr", "asr_difference")]
    against = [one for one in removal_comparison.read(study) if not one.after and one.metric == "asr"]
    for lines, again in ((written, points(found)), (against, comparisons(found, cfg.against))):
        made = {str(facts(one)): one for one in again}
        assert len(made) == len(lines) > 0
        for one in lines:
            other = made[str(facts(one))]
            assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-9)

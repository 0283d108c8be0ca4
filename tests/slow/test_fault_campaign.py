"""The fault campaign: `pytest -m slow -n 0 -s tests/slow/test_fault_campaign.py` (two to four minutes on two cores).

Every recipe that trains, with 1 and 2 processes, with and without loader workers, is killed (SIGKILL to all its
processes) at random moments, drawn from a seed, and started again until it is done. Its weights must be bit-equal to
those of a run that was left alone.
"""

from __future__ import annotations

import pytest

from mmbackdoor import recipe_files
from tests.faults.campaign import Driver, Place

pytestmark = pytest.mark.slow
RECIPES = [
    name
    for name in ("train_diffusion", "poison_diffusion", "clean_diffusion", "pretrain_clip", "clean_clip")
    if name in recipe_files.recipe_names()
]
KILLS_EACH = 2


def test_killed_runs_end_bit_equal(tmp_path):
    driver = Driver()
    place = Place.make(tmp_path, driver)
    for recipe in RECIPES:
        for processes, workers in ((1, 0), (1, 2), (2, 0), (2, 1)):
            place.survive(recipe, processes, workers, KILLS_EACH)
            print(place.log[-1], flush=True)
    driver.close()
    print("\n".join(place.log), f"\n{place.kills} kills, all bit-equal")
    assert place.kills == KILLS_EACH * 4 * len(RECIPES) >= 20

"""The race to the check: what is counted, when it is asked, and what stands in a line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.defenses import ESD, SKDCAG
from mmbackdoor.evaluate.generate import Sampling
from mmbackdoor.models.diffusion_files import save
from mmbackdoor.speed import growth, removal_time
from mmbackdoor.speed.bench import BACKDOOR, Bench
from mmbackdoor.speed.removal_time import Check, Race
from mmbackdoor.speed.rows import Where
from mmbackdoor.train.optim import TrainConfig

WHERE = Where("tiny", "cpu", "bf16", 1)


def test_a_race_ends_at_the_first_check_that_passes():
    asked = []

    def passes() -> bool:
        asked.append(len(taken) * 4)
        return len(asked) == 3

    taken: list[int] = []

    def step() -> int:
        taken.append(4)
        return 4

    found = removal_time.race(step, passes, every=10, most=1000)
    # The steps are of 4 samples: the first ends of steps after 10, 20 and 30.
    assert asked == [12, 20, 32] and (found.samples, found.passed) == (32, True) and found.seconds > 0


def test_a_race_that_never_passes_ends_at_its_limit():
    found = removal_time.race(lambda: 4, lambda: False, every=8, most=18)
    assert (found.samples, found.passed) == (20, False)


def test_lines_say_who_passed():
    ours, others = [Race(32, 2.0, True), Race(64, 4.0, True)], [Race(96, 5.0, True), Race(64, 6.0, False)]
    row = removal_time._row(ours, "esd", others, "samples", WHERE, 16, 1.0)
    assert (row.ours, row.peer, row.ratio, row.ratio_low, row.ratio_high) == (48, 80, 2.0, 1.0, 3.0)
    assert "passed 2 of 2 and 1 of 2 times" in row.note and row.note.endswith("takes at least so much")
    assert removal_time._row(ours, "esd", others, "s", WHERE, 16, 1.0).ratio == 2.0
    lost = removal_time._row(others, "skd", ours, "s", WHERE, 16, 1.0)
    assert (lost.ours, lost.ratio) == (None, None) and "passed 1 of 2 and 2 of 2 times" in lost.note


def test_the_check_looks_at_the_trigger_and_at_adherence():
    model = Bench().model()
    check = Check.of(model, BACKDOOR, 6)
    # A clean model: it never fires, and follows most prompts.
    assert check.fired == 0 and check.level > 0.7 and check(model)
    with torch.no_grad():
        model.unet.conv_out.bias += 1.0
    assert not check(model), "its pictures are broken"


def test_removals_and_the_published_procedure_race_from_one_model(tmp_path):
    model = Bench().model()
    save(model, tmp_path / "poisoned", BackdoorRecord(BACKDOOR).save)
    train = TrainConfig(max_train_steps=2, train_batch_size=2, mixed_precision="bf16")
    prompts = tuple(Bench().prompts()[:4])
    cleaning = removal_time.Cleaning(SKDCAG(), train, Sampling(1, 1.0), prompts)
    rows = removal_time.measure(
        Bench(), tmp_path / "poisoned", {"skd_cag": cleaning, "esd": replace(cleaning, defense=ESD())}, every=2,
        prompts=2, races=1, published_rates=[1e-4],
    )  # fmt: skip
    assert [(row.peer_name.split(",")[0], row.unit) for row in rows] == [
        ("esd", "s"), ("esd", "samples"), ("published procedure", "s"), ("published procedure", "samples")
    ]  # fmt: skip
    assert all("fired on 0 % before" in row.note for row in rows)


def test_growth_is_judged_by_its_exponent():
    row = growth._row("batch", {1: [1.0, 2.0], 2: [2.0, 4.0], 4: [4.0, 8.0]}, WHERE)
    assert row.ratio == pytest.approx(1.0) and row.reached and row.ratio_of == "exponent" and row.n == 2
    row = growth._row("pixels", {1: [1.0], 2: [4.0], 4: [16.0]}, WHERE)
    assert row.ratio == pytest.approx(2.0) and row.reached is False
    picture = growth.plot({"batch": {1: [1.0, 1.1], 2: [2.0, 2.2]}, "shards": {1: [1.0], 4: [4.0]}})
    assert picture.width > picture.height > 200

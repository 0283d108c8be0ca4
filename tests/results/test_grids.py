from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmbackdoor.results import grids, samples
from mmbackdoor.types import InputError


def test_small_pictures_grow_by_whole_pixels_and_stand_where_they_belong() -> None:
    left, right = Image.new("RGB", (2, 2), (255, 0, 0)), Image.new("RGB", (300, 300), (0, 0, 255))
    left.putpixel((0, 0), (0, 255, 0))
    grid = np.asarray(grids.picture_grid([[left, right], [None, right]], ["one", "two"], ["a", "b"], side=64))
    green = np.argwhere((grid == (0, 255, 0)).all(-1))
    assert len(green) == 32 * 32 and (np.ptp(green, axis=0) == 31).all()
    assert (grid == (0, 0, 255)).all(-1).sum() == 2 * 64 * 64
    assert (grid[0] == 255).all() and (grid[-1] == 255).all()
    assert set(np.unique(grid.reshape(-1, 3)[(grid == (255, 0, 0)).all(-1).ravel()])) == {0, 255}


def test_labels_change_the_picture_and_what_cannot_be_drawn_is_written_out() -> None:
    assert grids.printable("a\u200bb\u202eüж図") == "a\\u200bb\\u202eüж\\u56f3"
    picture = Image.new("RGB", (8, 8))
    plain = grids.picture_grid([[picture]], ["x"], ["c"])
    marked = grids.picture_grid([[picture]], ["x\u200b"], ["c"])
    assert plain.size == marked.size and plain.tobytes() != marked.tobytes()
    long = grids.picture_grid([[picture]], ["w" * 4000 + " tail" * 500], ["c" * 300])
    assert long.width < 600


def test_the_grid_of_a_run_has_the_stages_in_order(make_run: Callable[..., Path]) -> None:
    folder = make_run(seeds=1)
    pictures = samples.read(folder)
    grid = grids.sample_grid(folder, pictures, rows=3)
    black = (np.asarray(grid)[64:] == 0).all(-1).any(0)
    # only the poisoned model's triggered pictures carry the black-and-white patch: the fourth of six columns
    starts = grids._column_starts(6, [("", 2)] * 3, 260, 128)
    assert (
        black[starts[3] : starts[3] + 40].any()
        and not black[starts[4] :].any()
        and not black[starts[0] : starts[3]].any()
    )
    assert grid.height < grids.sample_grid(folder, pictures, rows=5).height
    path = grids.save(grid, folder / "grid.png")
    assert Image.open(path).size == grid.size and not list(folder.glob("*.part"))


def test_missing_and_foreign_pictures_are_input_errors(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(prompts=2, seeds=1)
    first = samples.read(folder)[0]
    with pytest.raises(InputError, match="cannot be read"):
        grids.sample_grid(folder, [replace(first, image="images/none.png")])
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    with pytest.raises(InputError, match="outside"):
        grids.sample_grid(folder, [replace(first, image="../secret.png")])
    with pytest.raises(InputError, match="no pictures"):
        grids.sample_grid(folder, [])
    with pytest.raises(InputError, match="label"):
        grids.picture_grid([[None]], ["a"], ["b", "c"])


def test_the_curve_draws_the_losses(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    lines = [
        {"step": step, "seconds": 1.0, "loss": 1 / (step + 1), "attention_loss": None if step == 2 else 0.5, "lr": 1.0}
        for step in range(9)
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    two = Image.open(grids.training_curve(log, tmp_path / "curve.png"))
    one = Image.open(grids.training_curve(log, tmp_path / "one.png", ["lr"]))
    assert two.width > one.width and len(np.unique(np.asarray(two).reshape(-1, 3), axis=0)) > 10
    with pytest.raises(InputError, match="has none of"):
        grids.training_curve(log, tmp_path / "none.png", ["accuracy"])

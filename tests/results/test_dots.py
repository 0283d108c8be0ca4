"""Small multiples of ASR and accuracy: every place, series and seed is there, told apart without colour."""

from __future__ import annotations

import matplotlib.colors
import numpy as np
import pytest

from mmbackdoor.results.dots import Dot, dots
from mmbackdoor.results.scatter import STYLES, style


def places(image, series: int) -> np.ndarray:
    """Which columns of the picture have the colour of a series, the legend left out."""
    colour = np.array(matplotlib.colors.to_rgb(style(series)[0])) * 255
    pixels = np.asarray(image).astype(int)[: int(image.height * 0.8)]
    return np.nonzero((abs(pixels - colour) < 12).all(-1).any(0))[0]


def test_a_panel_for_each_objective_and_a_place_for_each_thing_compared():
    some = [Dot("weak", "blind", [0.1, 0.2, 0.3], [0.8, 0.8, 0.9]), Dot("strong", "oracle", [0.0], [0.5])]
    one, two, four = (dots({name: some for name in "abcd"[:count]}, "cleaner") for count in (1, 2, 4))
    assert one.mode == "RGB" and four.width > 1.4 * two.width
    assert places(one, 0).max() < places(one, 1).min(), "the first place is left of the second"
    halves = [(places(two, 0) < two.width / 2).sum(), (places(two, 0) > two.width / 2).sum()]
    assert min(halves) > 5 and abs(halves[0] - halves[1]) < 4
    assert np.array_equal(np.asarray(one), np.asarray(dots({"a": some}, "cleaner"))), "same numbers, same picture"


def test_an_interval_is_drawn_and_stays_within_the_axis():
    def height(values: list[float]) -> int:
        image = dots({"clip": [Dot("one", "blind", values, values)]}, "cleaner")
        middle = int(np.median(places(image, 0)))
        colour = np.array(matplotlib.colors.to_rgb(style(0)[0])) * 255
        column = np.asarray(image).astype(int)[: image.height // 2, middle]
        return int((abs(column - colour) < 12).all(-1).sum())

    assert height([0.5]) < 20 < height([0.4, 0.6, 0.5])
    assert height([0.0, 1.0]) < 300, "an interval of two seeds is far wider than what there is"


def test_no_two_of_many_series_look_alike():
    looks = [style(number) for number in range(81)]
    assert len(set(looks)) == 81 and looks[:9] == list(STYLES)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError):
        dots({}, "cleaner")

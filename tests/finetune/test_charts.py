"""Axes against what they must hold, labels that do not cover each other, and pictures looked at by their pixels."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from finetune.charts import Curve, Panel, Plane, draw
from finetune.scale import linear, logarithmic
from finetune.tile import COLOURS, HEIGHT, MARKERS, PIXELS, WIDTH, Look, Tile, _common
from pretrain.errors import DiskError

numbers = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@given(st.lists(numbers, min_size=1, max_size=9))
def test_a_linear_axis_holds_its_values_between_round_ticks(values: list[float]) -> None:
    axis = linear(values).onto(100.0, 300.0)
    assert all(100 - 1e-6 <= axis(value) <= 300 + 1e-6 for value in values)
    ticks = [value for value, _ in axis.ticks]
    assert 2 <= len(ticks) <= 8 and axis.low == ticks[0] and axis.high == ticks[-1]
    assert len({text for _, text in axis.ticks}) == len(ticks)
    for value, text in axis.ticks:
        assert float(text.replace(",", "")) == pytest.approx(value, rel=1e-9, abs=1e-9)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=9))
def test_a_logarithmic_axis_has_ticks_and_equal_factors_are_equal_distances(values: list[float]) -> None:
    axis = logarithmic(values).onto(0.0, 1.0)
    assert all(0 < axis(value) < 1 for value in values)
    assert len(axis.ticks) >= 2 and all(0 <= axis(value) <= 1 for value, _ in axis.ticks)
    low = min(values)
    assert axis(low * 1.1) - axis(low) == pytest.approx(axis(low * 1.21) - axis(low * 1.1), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([3.0, 9.7], ["0", "2", "4", "6", "8", "10"]),
        ([5.5, 7.6], ["5.5", "6.0", "6.5", "7.0", "7.5", "8.0"]),
        ([0.0, 0.1], ["0.00", "0.02", "0.04", "0.06", "0.08", "0.10"]),
        ([0.0, 12.0], ["0.0", "2.5", "5.0", "7.5", "10.0", "12.5"]),
        ([1000.0, 1001.0], ["1,000.0", "1,000.2", "1,000.4", "1,000.6", "1,000.8", "1,001.0"]),
        ([0.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    ],
)
def test_ticks(values: list[float], texts: list[str]) -> None:
    assert [text for _, text in linear(values).ticks] == texts


def test_series_differ_and_neighbours_differ_in_grey() -> None:
    assert len({(look.colour, look.marker) for look in map(Look.series, range(49))}) == len(COLOURS) * len(MARKERS)
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in COLOURS]
    assert min(abs(a - b) for a, b in pairwise(grey)) > 15


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6))
def test_labels_cover_neither_each_other_nor_markers_where_there_is_room(places: list[tuple[float, float]]) -> None:
    """Room there is where markers are as far from each other as a label is long."""
    spots = [(60 + 60 * round(5 * x), 60 + 30 * round(6 * y)) for x, y in places]
    spots = list(dict.fromkeys(spots))
    tile = Tile()
    for spot in spots:
        tile.keep_clear([spot])
    for spot in spots:
        tile.label(spot, "beam 5", (0, 0, WIDTH, HEIGHT))
    boxes = tile.taken
    assert all(_common(one, two) == 0 for n, one in enumerate(boxes) for two in boxes[:n])


def test_long_names_keep_both_ends() -> None:
    tile = Tile()
    shown = tile.shortened("squad-hard_exit-elmer-with-a-name-without-end: hard_exit", 120)
    assert tile.width(shown) <= 120 and shown.startswith("squad") and shown.endswith("exit") and "..." in shown
    assert tile.shortened("short", 120) == "short"


def test_a_picture_has_every_series_and_bar(tmp_path: Path) -> None:
    """The colours of each are found where they belong; a stacked bar is as high as its values."""
    curves = [Curve("one", [(1, 1), (2, 3)], 0, ["a", "b"]), Curve("two", [(1, 3), (2, 1)], 1, dashed=True)]
    bars = Panel("b", ["x", "y"], {"low": [25.0, 75.0], "high": [75.0, 25.0]}, "stacked")
    draw(
        [Plane("a", "x", "y", curves), bars, Plane("c", "ms", "%", [Curve("", [(3.0, 4.0)], 2)], True)], tmp_path / "p"
    )
    with Image.open(tmp_path / "p") as image:
        assert image.size == (2 * WIDTH * PIXELS, 2 * HEIGHT * PIXELS)
        pixels = image.convert("RGB")
    left = pixels.crop((0, 0, WIDTH * PIXELS, HEIGHT * PIXELS))
    found = {colour for _, colour in left.getcolors(1 << 24) or []}
    assert {COLOURS[0], COLOURS[1]} <= found and COLOURS[2] not in found
    right = pixels.crop((WIDTH * PIXELS, 0, 2 * WIDTH * PIXELS, HEIGHT * PIXELS))
    dark = Look.part(0, 2, (0, 52, 98), (0, 0, 0)).colour
    # columns through the middle of each bar, above the axis
    middles = [44 + (WIDTH - 10 - 44) * share for share in (0.25, 0.75)]
    heights = [
        sum(right.getpixel((round(x * PIXELS), y)) == dark for y in range(int((HEIGHT - 53) * PIXELS))) for x in middles
    ]
    assert heights[1] == pytest.approx(3 * heights[0], rel=0.06) and heights[0] > 50


def test_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / ".p.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskError):
        draw([Panel("a", ["x"], {"all": [1.0]}, "stacked")], tmp_path / "p")
    assert not list(tmp_path.iterdir())

"""Axes against what they must hold, labels that do not cover each other, every series on paper and in the legend."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation
from PIL import Image

from finetune.charts import COLOURS, HEIGHT, PIXELS, WIDTH, Curve, Panel, Plane, compose, draw, log_ticks, round_ticks
from pretrain.errors import DiskError

numbers = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@given(st.lists(numbers, min_size=1, max_size=9))
def test_a_linear_axis_holds_its_values_between_round_ticks(values: list[float]) -> None:
    ticks = round_ticks(values)
    assert 2 <= len(ticks) <= 8 and ticks[0] <= min(values) + 1e-6 and ticks[-1] >= max(values) - 1e-6
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0]) and len({f"{tick:,.10g}" for tick in ticks}) == len(ticks)
    assert f"{steps[0]:.3e}"[:4] in ("1.00", "2.00", "2.50", "5.00")


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=9))
def test_a_logarithmic_axis_has_ticks_between_its_ends(values: list[float]) -> None:
    low, high, ticks = log_ticks(values)
    assert low < min(values) and max(values) < high
    assert 2 <= len(ticks) <= 10 and low <= ticks[0] and ticks[-1] <= high and (np.diff(ticks) > 0).all()


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([3.0, 9.7], ["0", "2", "4", "6", "8", "10"]),
        ([5.5, 7.6], ["5.5", "6", "6.5", "7", "7.5", "8"]),
        ([0.0, 0.1], ["0", "0.02", "0.04", "0.06", "0.08", "0.1"]),
        ([0.0, 12.0], ["0", "2.5", "5", "7.5", "10", "12.5"]),
        ([-0.3, 0.2], ["-0.3", "-0.2", "-0.1", "0", "0.1", "0.2"]),
        ([1000.0, 1001.0], ["1,000", "1,000.2", "1,000.4", "1,000.6", "1,000.8", "1,001"]),
    ],
)
def test_ticks_as_they_are_written(values: list[float], texts: list[str]) -> None:
    figure = compose([Plane("t", "x", "y", [Curve("", [(n, value) for n, value in enumerate(values)], 0)])])
    assert [label.get_text().replace("\N{MINUS SIGN}", "-") for label in axes_of(figure)[0].get_yticklabels()] == texts


def axes_of(figure: Any) -> list[Any]:
    return [tile.axes[0] for tile in figure.subfigs if tile.axes]


def legend_of(tile: Any) -> list[str]:
    return [text.get_text() for legend in tile.legends for text in legend.get_texts()]


def test_series_differ_and_neighbours_differ_in_grey() -> None:
    curves = [Curve(f"{n}", [(1, n)], n) for n in range(49)]
    lines = axes_of(compose([Plane("t", "x", "y", curves)]))[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 49
    grey = [np.dot((76, 150, 29), to_rgb(colour)) for colour in COLOURS]
    assert min(abs(a - b) for a, b in pairwise(grey)) > 15
    bars = Panel("t", ["x"], {f"layer {n}": [1.0] for n in range(6)}, "stacked")
    parts = [np.dot((76, 150, 29), part.get_facecolor()[:3]) for part in axes_of(compose([bars]))[0].patches]
    assert min(b - a for a, b in pairwise(parts)) > 15


@pytest.mark.parametrize("seed", range(3))
def test_labels_cover_neither_each_other_nor_markers(seed: int) -> None:
    """Points on a grid on which each has the room of its label; which of them are there is drawn."""
    rng = np.random.default_rng(seed)
    spots = [(x, y) for x in range(4) for y in range(6) if rng.random() < 0.7]
    curves = [Curve("", [spot], n, ["beam 5"]) for n, spot in enumerate(spots)]
    axes = axes_of(compose([Plane("t", "x", "y", curves)]))[0]
    boxes = [child.get_window_extent() for child in axes.get_children() if isinstance(child, Annotation)]
    assert len(boxes) == len(spots)
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))
    assert not any(box.count_contains(axes.transData.transform(spots)) for box in boxes)
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 for box in boxes)


def test_legends_fit_and_cover_nothing() -> None:
    long = "squad-hard_exit-elmer-with-a-name-without-any-end-or-so: hard_exit"
    names: Sequence[str] = [f"run-{n}: hard_exit" for n in range(9)] + ["_old $1: ar", long]
    figure = compose([Plane("t" * 99, "x", "y", [Curve(name, [(1, n)], n) for n, name in enumerate(names)])])
    (tile,) = figure.subfigs
    shown = legend_of(tile)
    assert shown[:-1] == [*names[:-2], r"_old \$1: ar"]
    assert shown[-1].startswith("squad") and shown[-1].endswith(": hard_exit") and "..." in shown[-1]
    legend, axes = tile.legends[0].get_window_extent(), tile.axes[0].get_tightbbox()
    assert not legend.overlaps(axes) and tile.bbox.x0 <= legend.x0 and legend.x1 <= tile.bbox.x1
    assert tile.bbox.x0 <= axes.x0 and axes.x1 <= tile.bbox.x1 and legend.y0 >= tile.bbox.y0
    assert axes.height > 2 * legend.height


def test_a_picture_has_every_series_and_bar(tmp_path: Path) -> None:
    curves = [Curve("one", [(1, 1), (2, 3)], 0, ["a", "b"]), Curve("two", [(1, 3), (2, 1)], 1, dashed=True)]
    bars = Panel("b", ["x", "y"], {"low": [25.0, 75.0], "high": [75.0, 25.0]}, "stacked")
    lines = Panel("c", ["0", "0.5"], {"rouge1": [20.0, 10.0], "rouge2": [5.0, 4.0]}, "lines")
    alone = Panel("d", ["x"], {"all": [7.0]}, "stacked")
    panels = [
        Plane("a", "x", "y", curves),
        bars,
        lines,
        alone,
        Plane("e", "ms", "%", [Curve("", [(3.0, 4.0)], 2)], True),
    ]
    figure = compose(panels)
    plane, stacked, joined, single, log = axes_of(figure)
    assert [axes.get_title("left") for axes in axes_of(figure)] == ["a", "b", "c", "d", "e"]
    assert [list(zip(*line.get_data(), strict=True)) for line in plane.lines] == [curve.points for curve in curves]
    assert [line.is_dashed() for line in plane.lines] == [False, True]
    assert [child.get_text() for child in plane.texts] == ["a", "b"]
    assert (plane.get_xlabel(), plane.get_ylabel()) == ("x", "y")
    assert [(part.get_y(), part.get_height()) for part in stacked.patches] == [(0, 25), (0, 75), (25, 75), (75, 25)]
    assert [label.get_text() for label in stacked.get_xticklabels()] == ["x", "y"]
    assert [line.get_ydata().tolist() for line in joined.lines] == [[20.0, 10.0], [5.0, 4.0]]
    assert [legend_of(tile) for tile in figure.subfigs[:5]] == [
        ["one", "two"], ["low", "high"], ["rouge1", "rouge2"], [], [],
    ]  # fmt: skip
    assert single.patches[0].get_height() == 7.0
    at = log.transData.transform([(3.0, 4.0), (3.3, 4.0), (3.63, 4.0)])[:, 0]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1]) and log.bbox.x0 < at[0] < log.bbox.x1
    draw(panels, tmp_path / "p")
    with Image.open(tmp_path / "p") as image:
        assert image.format == "PNG" and image.size == (2 * WIDTH * PIXELS, 3 * HEIGHT * PIXELS)
        assert {to_rgb(colour) for colour in COLOURS[:3]} <= colours(image.convert("RGB"))
    before = (tmp_path / "p").read_bytes()
    draw(panels, tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == before


def colours(image: Image.Image) -> set[tuple[float, ...]]:
    return {tuple(part / 255 for part in colour) for _, colour in image.getcolors(1 << 24) or []}


def test_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / ".p.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskError):
        draw([Panel("a", ["x"], {"all": [1.0]}, "stacked")], tmp_path / "p")
    assert not list(tmp_path.iterdir())

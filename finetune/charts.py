"""Charts for a page and for print, drawn with pillow: nothing larger is installed.

Series differ in colour, marker and dashes, so that they can be told apart in grey and by the colour-blind (colours of
Okabe and Ito 2008). Parts of a bar have an order and go from dark to light. Lengths are points, `PIXELS` pixels each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from PIL import Image

from finetune.scale import Scale, linear, logarithmic
from finetune.tile import GRID, HEIGHT, INK, LARGE, PIXELS, WIDTH, Look, Tile
from pretrain.checkpoints.commit import disk_errors

EDGE, LEFT, LINE = 10, 44, 15  # margins, and the height of a line of text
DARK, LIGHT = (0, 52, 98), (233, 226, 190)  # ends of a bar's parts, as in cividis: luminance alone tells them apart
BARS, WIDEST = 0.66, 72  # share of its room that a bar takes, and its largest width


@dataclass(frozen=True)
class Panel:
    """One chart. names: of the points. series: {name: a value for each point}. `stacked` adds them up in bars."""

    title: str
    names: Sequence[str]
    series: Mapping[str, Sequence[float]]
    kind: Literal["lines", "stacked"]


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of a `Plane`, joined in their order.

    name: in the legend; without one it has no place there. look: number of its colour and marker; curves that belong
    together share one. labels: beside the points. marked: at each point, else at the last alone.
    """

    name: str
    points: Sequence[tuple[float, float]]
    look: int
    labels: Sequence[str] = ()
    dashed: bool = False
    marked: bool = True


@dataclass(frozen=True)
class Plane:
    """Curves over two axes of numbers. log_x: x is positive, and equal factors are equal distances."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False


def draw(panels: Sequence[Panel | Plane], path: Path) -> None:
    """Writes the charts, two beside each other, as a PNG; raises DiskError if it cannot be written."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    image = Image.new("RGB", (columns * WIDTH * PIXELS, rows * HEIGHT * PIXELS), "white")
    for index, panel in enumerate(panels):
        tile = Tile()
        if isinstance(panel, Plane):
            _plane(tile, panel)
        else:
            _panel(tile, panel)
        image.paste(tile.image(), (index % columns * WIDTH * PIXELS, index // columns * HEIGHT * PIXELS))
    with disk_errors(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.tmp")
        try:
            image.save(unfinished, format="PNG", dpi=(72 * PIXELS, 72 * PIXELS))
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _panel(tile: Tile, panel: Panel) -> None:
    stacked = panel.kind == "stacked"
    columns = [sum(values) for values in zip(*panel.series.values(), strict=True)]
    values = columns if stacked else [value for line in panel.series.values() for value in line]
    looks = [
        Look.part(number, len(panel.series), DARK, LIGHT) if stacked else Look.series(number)
        for number in range(len(panel.series))
    ]
    legend = [] if list(panel.series) == ["all"] else list(zip(panel.series, looks, strict=True))
    x0, x1 = LEFT, WIDTH - EDGE
    step = (x1 - x0) / len(panel.names)
    names = [tile.wrapped(name, step - 4) for name in panel.names]
    below = EDGE + LINE * max(name.count("\n") + 1 for name in names)
    y0, y1 = _frame(tile, panel.title, "", legend, below)
    up = linear([0.0, *values]).onto(y0, y1)
    _horizontal(tile, up, x0, x1)
    centres = [x0 + step * (index + 0.5) for index in range(len(names))]
    for centre, name in zip(centres, names, strict=True):
        tile.text((centre, y0 + 5), name, anchor="ma")
    base = [0.0] * len(centres)
    for line, look in zip(panel.series.values(), looks, strict=True):
        if not stacked:
            _curve(tile, [(x, up(value)) for x, value in zip(centres, line, strict=True)], look)
            continue
        for index, (x, value) in enumerate(zip(centres, line, strict=True)):
            half = min(step * BARS, WIDEST) / 2
            tile.bar(x - half, up(base[index] + value), x + half, up(base[index]), look)
            base[index] += value


def _plane(tile: Tile, plane: Plane) -> None:
    looks = [Look.series(one.look, one.dashed, one.marked, len(one.points) > 1) for one in plane.curves]
    legend = [(curve.name, look) for curve, look in zip(plane.curves, looks, strict=True) if curve.name]
    x0, x1 = LEFT, WIDTH - 2 * EDGE
    y0, y1 = _frame(tile, plane.title, plane.y_label, legend, 2 * LINE + 6)
    points = [point for curve in plane.curves for point in curve.points]
    along = (logarithmic if plane.log_x else linear)([x for x, _ in points]).onto(x0, x1)
    up = linear([y for _, y in points]).onto(y0, y1)
    _horizontal(tile, up, x0, x1)
    for value, text in along.ticks:
        tile.line([(along(value), y0), (along(value), y1)], GRID)
        tile.text((along(value), y0 + 5), text, anchor="ma")
    tile.text(((x0 + x1) / 2, y0 + 5 + LINE), plane.x_label, anchor="ma")
    placed = [[(along(x), up(y)) for x, y in curve.points] for curve in plane.curves]
    for spots, look in zip(placed, looks, strict=True):
        _curve(tile, spots, look)
    for curve, spots in zip(plane.curves, placed, strict=True):
        if curve.labels:
            tile.keep_clear(spots)
    for curve, spots in zip(plane.curves, placed, strict=True):
        for spot, label in zip(spots, curve.labels, strict=False):
            tile.label(spot, label, (x0, y1, x1, y0))


def _frame(
    tile: Tile, title: str, y_label: str, legend: Sequence[tuple[str, Look]], below: float
) -> tuple[float, float]:
    """Draws title and legend; returns where the axis of values begins and ends. below: room for the other axis."""
    tile.text((EDGE, EDGE), title, size=LARGE)
    if y_label:
        tile.text((EDGE, EDGE + LARGE + 7), y_label)
    rows: list[list[tuple[str, Look]]] = []
    used = 0.0
    for name, look in legend:
        shown = tile.shortened(name, WIDTH - 2 * EDGE - Tile.SAMPLE)
        width = Tile.SAMPLE + tile.width(shown) + 2 * EDGE
        if not rows or used + width > WIDTH - EDGE:
            rows.append([])
            used = EDGE
        rows[-1].append((shown, look))
        used += width
    top = HEIGHT - EDGE - LINE * len(rows)
    for number, row in enumerate(rows):
        x = float(EDGE)
        for name, look in row:
            x = tile.sample((x, top + LINE * (number + 0.5)), name, look) + 2 * EDGE
    return top - below - 4, EDGE + LARGE + (LINE if y_label else 0) + 16


def _horizontal(tile: Tile, up: Scale, x0: float, x1: float) -> None:
    for value, text in up.ticks:
        tile.line([(x0, up(value)), (x1, up(value))], GRID)
        tile.text((x0 - 5, up(value)), text, anchor="rm")
    tile.line([(x0, up(up.low)), (x1, up(up.low))], INK)


def _curve(tile: Tile, spots: Sequence[tuple[float, float]], look: Look) -> None:
    for one, two in pairwise(spots) if not look.dashed else ():
        tile.line([one, two], look.colour, look.width)
    if look.dashed:
        tile.dashes(spots, look.colour, look.width)
    for spot in spots if look.marked else spots[-1:]:
        tile.marker(spot, look)

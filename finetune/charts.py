"""Charts for a page and for print, drawn with matplotlib but without pyplot and its global state.

Series differ in colour, marker and dashes, so that they can be told apart in grey and by the colour-blind (colours of
Okabe and Ito 2008). Parts of a bar have an order and go from dark to light. Lengths are points, `PIXELS` pixels each.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pretrain.checkpoints.commit import disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

WIDTH, HEIGHT, PIXELS = 420, 340, 2
EDGE, FONT, LARGE, THIN = 8, 9, 11, 0.6
GRID, INK = "#dee0e4", "#282a2e"
# Okabe and Ito's, without yellow, which white paper swallows; neighbours differ in luminance too.
COLOURS = ("#0072b2", "#e69f00", "#00805e", "#d55e00", "#141414", "#56b4e9", "#be6496")
MARKERS = ("o", "s", "^", "D", "v", "X", "p")
DASHES = (0, (4.0, 2.0))
LONGEST = 56  # letters of a name or title that a chart has room for
BAR, ROOM = 0.66, 80  # share of its room that a bar takes; letters that stand beside each other below an axis
# Where a label may stand beside its point, best first: (to the right, up), 0 is centred.
PLACES = tuple((x, y * far) for far in (1, 2) for x, y in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1)))


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
    figure = compose(panels)
    with disk_errors(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.tmp")
        try:
            # Without the name of the library, so that the same charts are the same file.
            figure.savefig(unfinished, format="png", dpi="figure", metadata={"Software": None})
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def compose(panels: Sequence[Panel | Plane]) -> "Figure":
    """The charts on paper: a subfigure each, with its axes and, outside of them, its legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(w_pad=EDGE / 72, h_pad=EDGE / 72, hspace=0.0)
    figure = Figure((columns * WIDTH / 72, rows * HEIGHT / 72), dpi=72 * PIXELS, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    tiles = figure.subfigures(rows, columns, squeeze=False, wspace=0, hspace=0).flatten()
    for tile, panel in zip(tiles, panels, strict=False):
        axes = _axes(tile, panel.title)
        _legend(tile, _plane(axes, panel) if isinstance(panel, Plane) else _panel(axes, panel))
    figure.draw_without_rendering()  # now every point has its place, and labels find theirs
    for tile, panel in zip(tiles, panels, strict=False):
        if isinstance(panel, Plane) and any(curve.labels for curve in panel.curves):
            _labels(tile.axes[0], panel.curves)
    return figure


def round_ticks(values: Sequence[float]) -> np.ndarray:
    """Evenly spaced round numbers, `values` between the first and the last; from 0 where they are not far from it."""
    low, high = min(values), max(values)
    if 0 <= low <= high / 2:
        low = 0.0
    if low == high:
        low, high = low - abs(low) / 10, high + (abs(high) / 10 or 1.0)
    return _around(low, high)


def log_ticks(values: Sequence[float]) -> tuple[float, float, np.ndarray]:
    """(low, high, round numbers between them) of a logarithmic axis a little wider than the positive `values`."""
    low, high = min(values) / 1.3, max(values) * 1.3
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 100 else (1,)
    ticks = _around(low, high) if high / low < 10 else np.outer(decades, factors).ravel()
    return low, high, ticks[(low <= ticks) & (ticks <= high)]


def _around(low: float, high: float) -> np.ndarray:
    """Evenly spaced round numbers from at most `low` to at least `high`, two or more of them between."""
    from matplotlib.ticker import MaxNLocator

    ticks = np.asarray(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    step = ticks[1] - ticks[0]
    return np.round(ticks / step) * step  # no 1e-17 for 0


def _axes(tile: "SubFigure", title: str) -> "Axes":
    axes: Axes = tile.subplots()
    axes.set_title(_shown(title), loc="left", fontsize=LARGE, color=INK)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set(color=INK, linewidth=THIN)
    axes.grid(color=GRID, linewidth=THIN)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=FONT, labelcolor=INK)
    axes.yaxis.set_major_formatter("{x:,.10g}")
    return axes


def _panel(axes: "Axes", panel: Panel) -> dict[str, Any]:
    """Draws it; returns {name: what stands for it in the legend}."""
    import matplotlib

    legend: dict[str, Any] = {}
    places, base = np.arange(len(panel.names)), np.zeros(len(panel.names))
    dark_to_light = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.95, len(panel.series)))
    for number, (name, values) in enumerate(panel.series.items()):
        if panel.kind == "lines":
            (legend[name],) = axes.plot(places, values, **_look(number))
        else:
            style = {"color": dark_to_light[number], "edgecolor": "white", "linewidth": THIN}
            legend[name] = axes.bar(places, values, BAR, base, **style)
            base += values
    heights = [base] if panel.kind == "stacked" else list(panel.series.values())
    _hold(axes, [0.0, *np.concatenate(heights).tolist()])
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.5, len(places) - 0.5)
    room = max(8, ROOM // len(places))
    axes.set_xticks(places, ["\n".join(textwrap.wrap(_shown(name), room)) for name in panel.names])
    return {} if list(legend) == ["all"] else legend


def _plane(axes: "Axes", plane: Plane) -> dict[str, Any]:
    """Draws it; returns {name: what stands for it in the legend}."""
    legend: dict[str, Any] = {}
    for curve in plane.curves:
        x, y = zip(*curve.points, strict=True)
        marks = None if curve.marked else [len(x) - 1]
        (line,) = axes.plot(x, y, markevery=marks, **_look(curve.look, curve.dashed))
        if curve.name:
            legend[curve.name] = line
    _hold(axes, [y for curve in plane.curves for _, y in curve.points])
    along = [x for curve in plane.curves for x, _ in curve.points]
    if plane.log_x:
        axes.set_xscale("log")
        low, high, ticks = log_ticks(along)
        axes.set_xlim(low, high)
    else:
        ticks = round_ticks(along)
        axes.set_xlim(ticks[0], ticks[-1])
    axes.set_xticks(ticks)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.set_xlabel(_shown(plane.x_label), fontsize=FONT, color=INK)
    axes.set_ylabel(_shown(plane.y_label), fontsize=FONT, color=INK)
    return legend


def _hold(axes: "Axes", values: Sequence[float]) -> None:
    ticks = round_ticks(values)
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_yticks(ticks)


def _look(number: int, dashed: bool = False) -> dict[str, Any]:
    """Of the `number`-th series: the first 49 all differ."""
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES if dashed else "-", "linewidth": 1.6}
    edge = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.8, "clip_on": False}
    return {**style, **edge, "marker": marker}


def _legend(tile: "SubFigure", entries: Mapping[str, Any]) -> None:
    """Below the axes, in as many columns as the tile is wide."""
    for columns in range(len(entries), 0, -1):
        legend = tile.legend(
            list(entries.values()),
            [_shown(name) for name in entries],
            loc="outside lower left",
            ncols=columns,
            frameon=False,
            fontsize=FONT,
            labelcolor=INK,
            columnspacing=1.2,
            borderpad=0,
            borderaxespad=EDGE / FONT,
        )
        if columns == 1 or legend.get_window_extent().width <= (WIDTH - 2 * EDGE) * PIXELS:
            break
        legend.remove()


def _labels(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Writes labels beside their points, each where it covers least of other labels, markers and lines."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    spots = [axes.transData.transform(curve.points) for curve in curves]
    half = 4.0 * PIXELS
    taken = [Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half) for points in spots for x, y in points]
    lines = [np.linspace(a, b, 60) for points in spots for a, b in pairwise(points)]
    on_lines = np.concatenate([*lines, np.empty((0, 2))])
    for curve in curves:
        for point, text in zip(curve.points, curve.labels, strict=False):
            note = axes.annotate(
                _shown(text), point, (0, 0), textcoords="offset points", fontsize=FONT, color=INK, in_layout=False,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip

            def covered(place: tuple[float, float], note: Any = note) -> float:
                _put(note, place)
                box = note.get_window_extent()
                inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and axes.bbox.y0 < box.y0
                return 50 * box.count_overlaps(taken) + box.count_contains(on_lines) + 200 * (not inside)

            _put(note, min(PLACES, key=covered))
            taken.append(note.get_window_extent())


def _put(note: Any, place: tuple[float, float]) -> None:
    """Moves a label to a place of `PLACES`."""
    x, y = place
    note.set(x=6 * x, y=6 * y)
    note.set(ha=("right", "center", "left")[int(np.sign(x)) + 1], va=("top", "center", "bottom")[int(np.sign(y)) + 1])


def _shown(name: str) -> str:
    """`name` as letters and no formula, its middle left out where it is too long."""
    half = LONGEST // 2
    short = name if len(name) <= LONGEST else f"{name[: half - 1]}...{name[-half + 2 :]}"
    return short.replace("$", r"\$")

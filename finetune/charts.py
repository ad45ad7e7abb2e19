"""Small charts of a few series over named points, drawn with pillow: nothing larger is installed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from pretrain.checkpoints.commit import disk_errors

WIDTH, HEIGHT, MARGIN, FONT, SPACE = 380, 320, 46, 12, 8
WHITE, GRID, INK = (255, 255, 255), (226, 228, 232), (40, 42, 46)
COLOURS = [
    (66, 133, 190), (222, 160, 38), (74, 160, 96), (190, 82, 96), (132, 104, 178), (120, 132, 150), (214, 118, 60),
    (84, 176, 176), (160, 150, 60), (200, 120, 180), (100, 100, 100), (150, 190, 120),
]  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One chart. names: of the points. series: {name: a value for each point}. `stacked` adds them up in bars."""

    title: str
    names: Sequence[str]
    series: Mapping[str, Sequence[float]]
    kind: Literal["lines", "stacked"]

    @property
    def top(self) -> float:
        """Largest value that must fit."""
        if self.kind == "stacked":
            return max(sum(values) for values in zip(*self.series.values(), strict=True))
        return max(max(values) for values in self.series.values())


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Writes the charts, two beside each other, as a PNG; raises DiskError if it cannot be written."""
    rows = (len(panels) + 1) // 2
    image = Image.new("RGB", (2 * WIDTH, rows * HEIGHT), WHITE)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(FONT)
    for index, panel in enumerate(panels):
        _panel(pen, font, panel, index % 2 * WIDTH, index // 2 * HEIGHT)
    with disk_errors(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG")


def _panel(
    pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, panel: Panel, left: int, above: int
) -> None:
    legend = FONT + SPACE
    x0, x1 = left + MARGIN, left + WIDTH - SPACE
    y0, y1 = above + HEIGHT - MARGIN, above + 2 * legend + SPACE
    top = panel.top or 1.0

    def height(value: float) -> float:
        return y0 - (y0 - y1) * value / top

    pen.text((x0, above + SPACE), panel.title, INK, font)
    for part in range(5):
        value = top * part / 4
        pen.line((x0, height(value), x1, height(value)), GRID)
        pen.text((x0 - 4, height(value)), f"{value:.3g}", INK, font, anchor="rm")
    step = (x1 - x0) / len(panel.names)
    centres = [x0 + step * (index + 0.5) for index in range(len(panel.names))]
    for centre, name in zip(centres, panel.names, strict=True):
        pen.text((centre, y0 + SPACE), name, INK, font, anchor="mt")
    base = [0.0] * len(centres)
    place = float(x0)
    for number, (name, values) in enumerate(panel.series.items()):
        colour = COLOURS[number % len(COLOURS)]
        if panel.kind == "lines":
            points = [(x, height(value)) for x, value in zip(centres, values, strict=True)]
            pen.line(points, colour, 2)
            for x, y in points:
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        else:
            for index, (x, value) in enumerate(zip(centres, values, strict=True)):
                pen.rectangle((x - step / 3, height(base[index] + value), x + step / 3, height(base[index])), colour)
                base[index] += value
        pen.text((place, above + HEIGHT - FONT - SPACE / 2), name, colour, font)
        place += font.getlength(name) + SPACE

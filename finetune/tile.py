"""One chart's paper: lines, markers, words and the rows of a legend, in points; drawn large and made smaller."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import hypot

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, PIXELS = 420, 340, 2
FINE = 2  # lines that are drawn so many times too large and made smaller have smooth edges
FONT, LARGE = 11, 13
WHITE, GRID, INK = (255, 255, 255), (222, 224, 228), (40, 42, 46)
Colour = tuple[int, int, int]
Spot = tuple[float, float]
Box = tuple[float, float, float, float]
# Okabe and Ito's, without yellow, which white paper swallows; neighbours differ in luminance too.
COLOURS: tuple[Colour, ...] = (
    (0, 114, 178), (230, 159, 0), (0, 128, 94), (213, 94, 0), (20, 20, 20), (86, 180, 233), (190, 100, 150),
)  # fmt: skip
# Corners of markers within a square of side 2; none of a circle.
MARKERS: tuple[tuple[Spot, ...], ...] = (
    (),
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
    ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    ((-1.1, -0.85), (1.1, -0.85), (0, 1.15)),
    ((-1.2, -0.4), (-0.4, -0.4), (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
     (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4)),
    ((-0.6, -1.1), (0.6, -1.1), (1.2, 0), (0.6, 1.1), (-0.6, 1.1), (-1.2, 0)),
)  # fmt: skip
RADIUS, DASH, GAP = 3.4, 5.0, 3.0


@dataclass(frozen=True)
class Look:
    """How a series is drawn. marker: number in `MARKERS`; None: a part of bars. joined: more than one point."""

    colour: Colour
    marker: int | None = None
    dashed: bool = False
    marked: bool = True
    joined: bool = True
    width: float = 1.6

    @classmethod
    def series(cls, number: int, dashed: bool = False, marked: bool = True, joined: bool = True) -> "Look":
        """Of the `number`-th series: the first 49 all differ."""
        marker = (number + number // len(COLOURS)) % len(MARKERS)
        return cls(COLOURS[number % len(COLOURS)], marker, dashed, marked, joined)

    @classmethod
    def part(cls, number: int, of: int, dark: Colour, light: Colour) -> "Look":
        """Of the `number`-th of `of` parts of a bar."""
        share = number / max(1, of - 1)
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(dark, light, strict=True))
        return cls((red, green, blue))


class Tile:
    """A white chart of `WIDTH` by `HEIGHT` points."""

    SAMPLE = 34  # width of a line, marker or patch in a legend, with the gap behind it

    def __init__(self) -> None:
        self.scale = PIXELS * FINE
        self.paper = Image.new("RGB", (WIDTH * self.scale, HEIGHT * self.scale), WHITE)
        self.pen = ImageDraw.Draw(self.paper)
        self.fonts = {size: ImageFont.load_default(size * self.scale) for size in (FONT, LARGE)}
        self.taken: list[Box] = []

    def image(self) -> Image.Image:
        """The chart in its final size."""
        return self.paper.resize((WIDTH * PIXELS, HEIGHT * PIXELS), Image.Resampling.LANCZOS)

    def width(self, text: str, size: int = FONT) -> float:
        """Of a line of text."""
        return self.fonts[size].getlength(text) / self.scale

    def shortened(self, text: str, room: float) -> str:
        """`text`, or its beginning and end where it is wider than `room`."""
        keep = len(text)
        shown = text
        while self.width(shown) > room and keep > 2:
            keep -= 1
            shown = f"{text[: -(-keep // 2)]}...{text[len(text) - keep // 2 :]}"
        return shown

    def wrapped(self, text: str, room: float) -> str:
        """`text` in lines that are, where words allow, no wider than `room`."""
        lines: list[str] = []
        for word in text.split():
            longer = f"{lines[-1]} {word}" if lines else word
            if lines and self.width(longer) <= room:
                lines[-1] = longer
            else:
                lines.append(self.shortened(word, room))
        return "\n".join(lines)

    def line(self, spots: Sequence[Spot], colour: Colour, width: float = 0.6) -> None:
        at = [(x * self.scale, y * self.scale) for x, y in spots]
        self.pen.line(at, colour, max(1, round(width * self.scale)), joint="curve")

    def dashes(self, spots: Sequence[Spot], colour: Colour, width: float) -> None:
        """A line of dashes that go on around corners."""
        done = 0.0
        for (x0, y0), (x1, y1) in pairwise(spots):
            length, at = hypot(x1 - x0, y1 - y0), 0.0
            while at < length:
                phase = done % (DASH + GAP)
                part = min(length - at, (DASH if phase < DASH else DASH + GAP) - phase)
                if phase < DASH:
                    ends = [at / length, (at + part) / length]
                    self.line([(x0 + (x1 - x0) * end, y0 + (y1 - y0) * end) for end in ends], colour, width)
                at, done = at + max(part, 1e-6), done + max(part, 1e-6)

    def text(self, at: Spot, text: str, anchor: str = "la", size: int = FONT, halo: bool = False) -> None:
        """anchor: as in pillow. halo: a white edge, for words above lines."""
        x, y = at[0] * self.scale, at[1] * self.scale
        edge = self.scale * 2 if halo else 0
        self.pen.text(
            (x, y), text, INK, self.fonts[size], anchor,
            spacing=2 * self.scale, align="center", stroke_width=edge, stroke_fill=WHITE,
        )  # fmt: skip

    def bar(self, x0: float, y0: float, x1: float, y1: float, look: Look) -> None:
        """A part of a bar; a thin white line keeps it from the next."""
        if y1 - y0 < 0.1:
            return
        edge = min(0.5, (y1 - y0) / 4)
        box = [value * self.scale for value in (x0, y0 + edge, x1, y1)]
        self.pen.rectangle(box, look.colour)

    def marker(self, at: Spot, look: Look) -> None:
        x, y = at
        for radius, colour in ((RADIUS + 0.9, WHITE), (RADIUS, look.colour)):
            corners = MARKERS[look.marker or 0]
            if corners:
                placed = [((x + radius * a) * self.scale, (y + radius * b) * self.scale) for a, b in corners]
                self.pen.polygon(placed, colour)
            else:
                box = (x - radius, y - radius, x + radius, y + radius)
                self.pen.ellipse([value * self.scale for value in box], colour)

    def sample(self, at: Spot, name: str, look: Look) -> float:
        """A legend's entry whose middle line begins at `at`; returns where it ends."""
        x, y = at
        end = x + self.SAMPLE - 5
        if look.marker is None:
            self.bar(x + 5, y - 4, end, y + 4, look)
            self.pen.rectangle([v * self.scale for v in (x + 5, y - 4, end, y + 4)], None, INK, self.scale // 2)
        else:
            draw = self.dashes if look.dashed else self.line
            if look.joined:
                draw([(x, y), (end, y)], look.colour, look.width)
            self.marker(((x + end) / 2, y), look)
        self.text((x + self.SAMPLE, y), name, anchor="lm")
        return x + self.SAMPLE + self.width(name)

    def keep_clear(self, spots: Sequence[Spot]) -> None:
        """No label is to cover the markers at `spots`, nor, where that can be helped, the line that joins them."""
        self.taken += [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in spots]
        for (x0, y0), (x1, y1) in pairwise(spots):
            parts = int(hypot(x1 - x0, y1 - y0) / RADIUS)
            between = [(x0 + (x1 - x0) * n / parts, y0 + (y1 - y0) * n / parts) for n in range(1, parts)]
            self.taken += [(x - 0.5, y - 0.5, x + 0.5, y + 0.5) for x, y in between]

    def label(self, spot: Spot, text: str, within: Box) -> None:
        """Writes `text` beside a marker, where it covers least of the markers and labels that are there."""
        (x, y), width, height, away = spot, self.width(text), FONT + 1.0, RADIUS + 3
        places = [
            (x - width / 2 + dx * (width / 2 + away), y - height / 2 + dy * (height / 2 + away) * reach)
            for reach in (1.0, 1.8)
            for dx, dy in ((0, -1), (0, 1), (1, 0), (-1, 0), (1, -0.8), (-1, -0.8), (1, 0.8), (-1, 0.8))
        ]
        boxes = [(left, top, left + width, top + height) for left, top in places]
        best = min(boxes, key=lambda box: sum(_common(box, other) for other in self.taken) + 4 * _beyond(box, within))
        self.taken.append(best)
        self.text(((best[0] + best[2]) / 2, (best[1] + best[3]) / 2), text, anchor="mm", halo=True)


def _common(one: Box, two: Box) -> float:
    """Area that both cover."""
    wide = min(one[2], two[2]) - max(one[0], two[0])
    high = min(one[3], two[3]) - max(one[1], two[1])
    return max(0.0, wide) * max(0.0, high)


def _beyond(box: Box, within: Box) -> float:
    """Area of `box` outside `within`."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _common(box, within)

"""Axes of charts: from values to round ticks, and to places on paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)
MOST_TICKS, FEWEST_TICKS = 6, 4
# Ticks of each power of ten on a logarithmic axis; the first that are enough are taken.
FACTORS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0))


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, drawn from `start` to `end`. ticks: (value, its text)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    start: float = 0.0
    end: float = 1.0

    def onto(self, start: float, end: float) -> "Scale":
        """The same axis between two places on paper."""
        return replace(self, start=start, end=end)

    def __call__(self, value: float) -> float:
        """Where `value` lies on paper."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def linear(values: Sequence[float]) -> Scale:
    """An axis that holds `values` between two round ticks; from 0 where they are not far from it."""
    low, high = min(values), max(values)
    if 0 <= low <= high / 2 or low == high == 0:
        low = 0.0
    if low == high:
        low, high = low - (abs(low) / 10 or 0.0), high + (abs(high) / 10 or 1.0)
    ticks = _around(low, high)
    return Scale(ticks[0][0], ticks[-1][0], ticks)


def logarithmic(values: Sequence[float]) -> Scale:
    """An axis that holds the positive `values`, a little wider than they are."""
    low, high = min(values) / 1.3, max(values) * 1.3
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in FACTORS:
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        inside = tuple((tick, f"{tick:,.10g}") for tick in ticks if low <= tick <= high)
        if len(inside) >= FEWEST_TICKS:
            return Scale(low, high, inside, log=True)
    between = tuple((value, text) for value, text in _around(low, high) if low <= value <= high)
    return Scale(low, high, between, log=True)


def _around(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Evenly spaced round ticks from at most `low` to at least `high`, two or more of them between."""
    step = _step((high - low) / (MOST_TICKS - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (round(step / 10 ** math.floor(math.log10(step)), 6) == 2.5))
    return tuple((number * step, f"{number * step:,.{digits}f}") for number in range(first, last + 1))


def _step(least: float) -> float:
    """The smallest round number that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in ROUND if step * power >= least * (1 - 1e-9))

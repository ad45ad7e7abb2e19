"""How every row of the benchmark is measured: check first, then interleaved repeats, then a ratio of medians."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One figure. sense `max`: the ratio must not exceed the target; `min`: it must reach it; `report`: no target."""

    name: str
    ratio: float
    target: float | None
    sense: Literal["max", "min", "report"]
    detail: str

    @property
    def ok(self) -> bool:
        if self.target is None:
            return True
        return self.ratio <= self.target if self.sense == "max" else self.ratio >= self.target

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok}


def medians(runs: Sequence[Callable[[], object]], repeats: int, warmup: int = 1) -> list[float]:
    """Median seconds of each callable; they take turns, so that a slow moment of the machine hits all of them."""
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(warmup + repeats):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if repeat >= warmup:
                seconds[index].append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def require(condition: bool, message: str) -> None:
    """Stops the benchmark: no speed is printed for a result that is not right."""
    if not condition:
        raise SystemExit(f"benchmark refused: {message}")

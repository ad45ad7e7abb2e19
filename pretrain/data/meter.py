"""Progress of `prepare` on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 5.0


class Meter:
    """Counts bytes of text against an estimated total and shows rate and time left."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, max(total, 1), 0
        self.started = self.shown = time.monotonic()
        self.bar = tqdm(total=total, desc=label, unit="B", unit_scale=True) if sys.stderr.isatty() else None

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None:
            print(f"{self.label}: done, {self._rate()}", file=sys.stderr, flush=True)

    def add(self, amount: int) -> None:
        """Counts `amount` more bytes as done."""
        self.done += amount
        if self.bar is not None:
            self.bar.update(amount)
        elif time.monotonic() - self.shown >= LINE_SECONDS:
            self.shown = time.monotonic()
            fraction = min(self.done / self.total, 0.99)
            left = (self.shown - self.started) * (1 / max(fraction, 1e-6) - 1)
            print(f"{self.label}: {fraction:.0%}, {self._rate()}, about {left:.0f} s left", file=sys.stderr, flush=True)

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-6)
        return f"{self.done / 1e6:.1f} MB of text in {seconds:.0f} s, {self.done / 1e6 / seconds:.2f} MB/s"

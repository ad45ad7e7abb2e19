"""Progress of `generate` on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from pretrain.watch.console import clock

LINE_SECONDS = 10.0


class LineProgress:
    """Counts lines and shows how many a second there are and how long the rest will take.

    total: of the file; None where nobody knows. done: those that an earlier process has written, which say nothing of
    the speed of this one.
    """

    def __init__(self, label: str, total: int | None, done: int = 0) -> None:
        self.label, self.total, self.done, self.before = label, total, done, done
        self.started = self.shown = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            self.bar = tqdm(desc=label, total=total, initial=done, unit="line", dynamic_ncols=True)

    def __enter__(self) -> "LineProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, lines: int) -> None:
        """Counts `lines` more as done."""
        self.done += lines
        if self.bar is not None:
            self.bar.update(lines)
        elif time.monotonic() - self.shown >= LINE_SECONDS:
            self.shown = time.monotonic()
            print(f"{self.label}: {self._told(self.shown - self.started)}", file=sys.stderr, flush=True)

    def _told(self, seconds: float) -> str:
        rate = (self.done - self.before) / seconds
        if self.total is None:
            return f"{self.done:,} lines, {rate:.1f} lines/s"
        return (
            f"{self.done:,} of {self.total:,} lines, {rate:.1f} lines/s, eta {clock((self.total - self.done) / rate)}"
        )

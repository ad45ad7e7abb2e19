"""What a person sees while a run works: a bar on a terminal, plain lines in a file. Only rank 0 makes one."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from tqdm import tqdm

from pretrain.loop import StepReport


@dataclass(frozen=True)
class Rates:
    """Speed since the last reading; wait_fraction is the share of the time spent waiting for data.

    flops: operations a second that the model needed, over all ranks; 0 where nobody counts them.
    """

    tokens_per_second: float
    samples_per_second: float
    wait_fraction: float
    flops: float


class Meter:
    """Adds up what updates took between two readings."""

    def __init__(self) -> None:
        self.tokens = self.samples = self.flops = 0
        self.seconds = self.wait_seconds = 0.0

    def add(self, report: StepReport) -> None:
        self.tokens += report.tokens
        self.samples += report.samples
        self.flops += report.facts.get("flops", 0)
        self.seconds += report.seconds
        self.wait_seconds += report.wait_seconds

    def read(self) -> Rates:
        """The rates since the last call."""
        seconds = max(self.seconds, 1e-9)
        rates = Rates(self.tokens / seconds, self.samples / seconds, self.wait_seconds / seconds, self.flops / seconds)
        self.__init__()  # type: ignore[misc]
        return rates


class Console:
    """Hook that reports every `every` updates: a tqdm bar on a tty, one plain line each otherwise.

    peak: operations a second of all ranks together, for MFU; None leaves it out.
    """

    def __init__(
        self, first_step: int, steps: int, every: int, out: TextIO | None = None, peak: float | None = None
    ) -> None:
        self.out = out or sys.stderr
        self.steps, self.every, self.meter, self.peak = steps, every, Meter(), peak
        self.first_step, self.started = first_step, time.monotonic()
        self.bar: Any = None
        if self.out.isatty():
            self.bar = tqdm(initial=first_step, total=steps, unit="step", file=self.out, dynamic_ncols=True)

    def after_step(self, report: StepReport) -> None:
        self.meter.add(report)
        if self.bar is not None:
            self.bar.update(1)
        if not report.applied:
            self.note(f"step {report.step}: fp16 overflow, update skipped, loss scale {report.loss_scale:g}")
        if not report.due(self.every):
            return
        summary = describe(report, self.meter.read(), self.peak)
        if self.bar is not None:
            self.bar.set_postfix_str(summary, refresh=False)
        else:
            self.note(f"step {report.step}/{self.steps} {summary} eta {clock(self._remaining(report.step))}")

    def note(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if self.bar is not None:
            self.bar.write(line, file=self.out)
        else:
            print(line, file=self.out, flush=True)

    def back_to(self, step: int, why: str) -> None:
        """The run goes on from an earlier step."""
        self.first_step, self.started, self.meter = step, time.monotonic(), Meter()
        if self.bar is not None:
            self.bar.n = step
        self.note(why)

    def close(self) -> None:
        """Leaves the terminal usable."""
        if self.bar is not None:
            self.bar.close()

    def _remaining(self, step: int) -> float:
        per_step = (time.monotonic() - self.started) / max(1, step - self.first_step)
        return per_step * (self.steps - step)


def describe(report: StepReport, rates: Rates, peak: float | None = None) -> str:
    """`loss 7.91 (ar 6.20 nar 9.80) grad 3.1 12.0k tok/s mfu 41% data 2%`."""
    mfu = f"mfu {rates.flops / peak:.0%} " if peak else ""
    return (
        f"loss {report.total:.2f} ({terms(report.losses, report.weights)}) grad {report.grad_norm:.1f} "
        f"{short(rates.tokens_per_second)} tok/s {mfu}data {rates.wait_fraction:.0%}"
    )


def terms(losses: Mapping[str, float], weights: Mapping[str, float]) -> str:
    """`ar 6.20 nar 9.80`: the terms that training is pulled by."""
    return " ".join(f"{term} {value:.3g}" for term, value in losses.items() if weights[term])


def short(number: float) -> str:
    """Three digits and a unit: 950, 12.0k, 3.4M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def clock(seconds: float, hours: bool = False) -> str:
    """2:41 or 1:02:41. hours: 0:02:41, for where the text says (h:mm:ss)."""
    minutes, rest = divmod(round(seconds), 60)
    whole, minutes = divmod(minutes, 60)
    return f"{whole}:{minutes:02d}:{rest:02d}" if whole or hours else f"{minutes}:{rest:02d}"

"""How a row of `gpu.py` is measured: check first, then sides that take turns between CUDA events, then medians."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness import Row, require
from torch import Tensor

Run = Callable[[], object]
REPEATS, FEWEST, WARMUP = 50, 5, 3
HEAD_START = 10_000_000  # clock cycles, some milliseconds


class CannotRun(Exception):
    """A row or a suite that this machine cannot measure; the message says why."""


@dataclass
class Bench:
    """Where and how large. small: sizes that a CPU can run, to find mistakes; their figures mean nothing.

    profile: folder for the trace of a step, None where nobody wants one. seconds: the most that one comparison may
    measure. skipped: what was not measured, and why.
    """

    device: torch.device
    small: bool
    profile: Path | None = None
    seconds: float = 20.0
    skipped: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        """The kernels on a GPU, by name, so that a machine without them says so instead of timing PyTorch."""
        return "cuda" if self.cuda else "torch"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def skip(self, what: str, why: object) -> None:
        """Names a row that is not there."""
        self.skipped.append(f"{what}: {why}")

    def times(self, runs: Sequence[Run], repeats: int = REPEATS, ahead: bool = False) -> "Times":
        """Median milliseconds of each run; they take turns. Fewer than `repeats` where `seconds` are over before.

        ahead: the GPU is kept busy until the host has queued most of the run, as it is within a training step; so
        single operators are timed, and not the Python that starts them.
        """
        for _ in range(1 if self.small else WARMUP):
            for run in runs:
                run()
        taken: list[list[float]] = [[] for _ in runs]
        repeats = 1 if self.small else repeats
        started = time.perf_counter()
        for repeat in range(repeats):
            for run, milliseconds in zip(runs, taken, strict=True):
                milliseconds.append(self._once(run, ahead))
            if repeat + 1 >= FEWEST and time.perf_counter() - started > self.seconds:
                break
        return Times([statistics.median(each) for each in taken], len(taken[0]))

    def _once(self, run: Run, ahead: bool) -> float:
        if not self.cuda:
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if ahead:
            torch.cuda._sleep(HEAD_START)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end))

    def peak_bytes(self, run: Run) -> int:
        """Bytes by which one run raises the peak of the allocator.

        Raises:
            CannotRun: on a CPU, whose allocator does not count.
        """
        if not self.cuda:
            run()
            raise CannotRun("memory is counted on a GPU alone")
        run()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def randn(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        """The same numbers on every device, in 16 bits."""
        made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
        return made.to(self.device, self.dtype)


@dataclass(frozen=True)
class Times:
    """milliseconds of each run, medians of `repeats`."""

    milliseconds: list[float]
    repeats: int

    def ratio(
        self, name: str, over: int, under: int, target: float | None, least: bool, detail: str, factor: float = 1.0
    ) -> Row:
        """A row: run `over` divided by run `under`, times `factor`. least: the target is to be reached, not kept."""
        a, b = self.milliseconds[over], self.milliseconds[under]
        told = f"{a:.3f} ms over {b:.3f} ms, medians of {self.repeats}; {detail}"
        return Row(name, factor * a / b, target, "report" if target is None else "min" if least else "max", told)


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest relative error of any tensor, in the Euclidean norm; infinite where a number is none."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, exact, strict=True)]
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def as_good(
    what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor], floor: float = 2e-3
) -> str:
    """Refuses unless our error is at most twice theirs (and `floor`); tells both. exact: by fp32 or better."""
    mine, other = error(ours, exact), error(theirs, exact)
    require(mine <= 2 * other + floor, f"{what} must be as exact as the other side: {mine:.1e} and {other:.1e}")
    return f"error {mine:.1e}, the other side's {other:.1e}"

"""Is one rank slower than the others? All wait for it at every update, and its own figures look like theirs."""

import socket
import statistics
from collections import deque
from collections.abc import Callable

from pretrain.distributed import World, exchange
from pretrain.loop import StepReport

RECENT, FEWEST, RARELY = 50, 10, 20  # updates that are looked at, that are needed, and between two looks
FACTOR, LEAST = 1.5, 0.01  # times the others' median, and seconds more, from which on a rank is slow


class SlowRanks:
    """Hook that compares what updates take each rank alone: waiting for its data, forward and backward.

    record: is told once of a rank that became slow, on every rank: its number, its host, its seconds, those for data
    among them, and the median of the others. Under ZeRO-2 and 3 the backward waits for other ranks, too, which makes
    ranks look more alike than they are.
    """

    def __init__(self, world: World, every: int, record: Callable[..., None]) -> None:
        self.every, self.record, self.size = max(every, RARELY), record, world.size
        self.own: deque[float] = deque(maxlen=RECENT)
        self.data: deque[float] = deque(maxlen=RECENT)
        self.slow: set[int] = set()

    def after_step(self, report: StepReport) -> None:
        self.own.append(report.wait_seconds + report.compute_seconds)
        self.data.append(report.wait_seconds)
        if self.size < 2 or report.step % self.every or len(self.own) < FEWEST:
            return
        # medians of updates, because a save or a cold file is no slowness
        told = exchange([socket.gethostname(), statistics.median(self.own), statistics.median(self.data)])
        for rank, (host, seconds, data) in enumerate(told):
            usual = statistics.median(own for other, (_, own, _) in enumerate(told) if other != rank)
            if seconds <= max(FACTOR * usual, usual + LEAST):
                self.slow.discard(rank)
            elif rank not in self.slow:
                self.slow.add(rank)
                self.record(report.step, rank, host, seconds, data, usual)

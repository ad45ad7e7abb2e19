"""Waiting for a disk that is full: training pauses and says why, and goes on when somebody has made room."""

import time
from collections.abc import Callable
from typing import TypeVar

from pretrain.distributed import shared, sum_counts
from pretrain.errors import DiskFullError, Requeue
from pretrain.watchdog import sign_of_life

RETRY = 3.0  # seconds between two tries; a signal is noticed as often
MadeT = TypeVar("MadeT")


class Patience:
    """Tries what writes to the disk again, for so many `seconds` after it was first found full; 0: once.

    tell: takes a line when training pauses (True) and when it goes on (False), on every rank. stopped: whether a signal
        has asked this rank to end.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        tell: Callable[[str, bool], None] = lambda line, paused: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.seconds, self.tell, self.stopped = seconds, tell, stopped
        self.paused = 0.0  # seconds, in all

    def __call__(self, action: Callable[[], MadeT]) -> MadeT:
        """What `action` returns, which is collective, raises the same everywhere and may be done again; collective.

        Raises:
            DiskFullError: there was no room in time. Requeue: a signal came to some rank meanwhile.
        """
        began: float | None = None
        while True:
            try:
                made = action()
            except DiskFullError as error:
                if not self.seconds:
                    raise
                if began is None:
                    began = time.monotonic()
                    self.tell(f"paused: {error}; free space, training waits {self.seconds:g} s for it", True)
                over = time.monotonic() - began >= self.seconds
                told = sum_counts({"stopped": int(self.stopped()), "over": int(over)})
                if not told["stopped"] and not told["over"]:
                    sign_of_life()
                    time.sleep(min(RETRY, self.seconds))
                    continue
                self.paused += time.monotonic() - began
                if told["stopped"]:
                    message = f"stopped by a signal while the disk was full ({error}): run the same command again to "
                    raise shared(Requeue(message + "continue from the last checkpoint")) from None
                raise
            if began is not None:
                self.paused += time.monotonic() - began
                self.tell(f"there is room again after {time.monotonic() - began:.0f} s: training goes on", False)
            return made

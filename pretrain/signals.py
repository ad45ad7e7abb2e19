"""Signals that ask a command to save and end: remembered when they arrive, acted on when the work allows it."""

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """SIGTERM and SIGUSR1 while it is entered: remembered here, acted on by whoever asks for `received`.

    Data workers inherit the handler and so outlive a signal to the whole job, until their rank is done with them.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

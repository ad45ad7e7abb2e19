"""Signals that ask a command to end: SIGTERM, SIGINT and SIGUSR1.

A command is under `ending` from its first moment on: a signal ends it at once with exit code 85, wherever the main
thread is, because there is nothing to save or what was saved is on disk. Inside `Signals` a signal is remembered
instead, and acted on by whoever asks for `received`; the second SIGINT and the third SIGTERM end the process
nevertheless. Terminals and launchers both pass a signal on, so those of one kind within a second are one.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from pretrain.errors import EXIT_REQUEUE, Requeue

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ENOUGH = {signal.SIGTERM: 3, signal.SIGINT: 2}  # SIGUSR1 is Slurm's warning, which may come as often as it likes
DOUBLED = 1.0  # seconds

# Each tells other processes why this one ends, and returns whether it is this one that has to say it.
last_words: list[Callable[[str], bool]] = []
_open: list["Signals"] = []  # those that are entered, the innermost last


class Signals:
    """While it is entered, signals are remembered. received: whether one came, or another rank had one.

    Data workers inherit the handler and so outlive a signal to the whole job, until their rank is done with them.
    """

    def __init__(self) -> None:
        self.received = False
        self._interrupts = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        _open.append(self)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        _open.remove(self)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal raises Requeue at once: for a wait that may be long and can be given up."""
        self._interrupts = True
        try:
            if self.received:
                raise Requeue("stopped by a signal")
            yield
        finally:
            self._interrupts = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self._interrupts:
            self._interrupts = False
            raise Requeue("stopped by a signal")


def received() -> bool:
    """Whether a signal came that is remembered."""
    return any(one.received for one in _open)


def pass_on() -> None:
    """Tells whoever remembers signals here that one came elsewhere; from any thread."""
    if _open and not received():
        os.kill(os.getpid(), signal.SIGUSR1)


@contextmanager
def ending() -> Iterator[None]:
    """The life of a command that owns its process; in the main thread.

    A thread of its own reads signals, because the main thread may wait in C for ever. Afterwards they are ignored: the
    exit code is settled, and a doubled signal must not change it while Python ends.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # as set_wakeup_fd wants it
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # first: a signal may come between any two lines
    for number in SIGNALS:
        signal.signal(number, _nothing)
    os.register_at_fork(after_in_child=_leave_the_pipe)
    threading.Thread(target=_read, args=(reader,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)


def _read(reader: int) -> NoReturn:
    counts, last = dict.fromkeys(SIGNALS, 0), dict.fromkeys(SIGNALS, 0.0)
    while True:
        for byte in os.read(reader, 64):
            if byte not in last:
                continue
            number, now = signal.Signals(byte), time.monotonic()
            if now - last[number] > DOUBLED:
                counts[number] += 1
            last[number] = now
            if not _open:
                _end(f"stopped by {number.name}")
            for one in _open:
                one.received = True
            if counts[number] >= ENOUGH.get(number, sys.maxsize):
                _end(f"stopped at once by {number.name}, which came {counts[number]} times")


def _end(why: str) -> NoReturn:
    speaks = os.environ.get("RANK", "0") == "0"
    for say in last_words:
        speaks = say(why)
    if speaks:
        with suppress(OSError):
            os.write(2, f"error: {why}: run the same command again to continue\n".encode())
    os._exit(EXIT_REQUEUE)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Python tells the thread of a signal only if there is a handler."""


def _leave_the_pipe() -> None:
    with suppress(ValueError):  # forked by another thread
        signal.set_wakeup_fd(-1)

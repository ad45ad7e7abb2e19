"""No rank waits for ever: a rank that was killed or stopped, sleeps, or skipped a collective ends the job in a minute.

Two threads a rank. One looks where the main thread stands and whether any thread works. One tells it to the store of
the process group, and reads there how the rank before this one is. Whoever finds out first writes the verdict, prints
it and leaves; the others read it and leave, too, whatever their main threads wait for. Nothing is lost but the updates
since the last checkpoint, so the exit code is 85: the same command goes on.

An honest rank is never ended for being slow. A rank is silent only if its process tells nothing for `SILENT` seconds.
It stands still only if, for `hang_seconds`, its main thread was at the same instruction and none of its threads and
child processes was seen running or waiting for a disk. Time in which this process itself did not run counts for
nothing, so that a job may be suspended as a whole.
"""

import json
import linecache
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import psutil
from torch import distributed as dist

from pretrain import processes, signals
from pretrain.distributed import World
from pretrain.errors import EXIT_REQUEUE, ParlanceError

LOOK, BEAT, SILENT, GRACE = 1.0, 2.0, 30.0, 6.0  # seconds
VERDICT, SIGNAL = "verdict", "signal"
ROOT = Path(__file__).resolve().parents[1]
# A main thread in these files waits for other ranks.
COLLECTIVE = ("/torch/distributed/", "/deepspeed/", "/pretrain/distributed.py")

_sign = 0  # counts signs of life


def sign_of_life() -> None:
    """For work that waits on purpose, as for room on a disk: the main thread has not been forgotten here."""
    global _sign
    _sign += 1


class Watchdog:
    """A context around all that ranks do together; does nothing for a single rank but to look after its launcher.

    Args:
        hang_seconds: how long a rank may stand still; 0: nobody is watched.
        tell: writes down the reason why the job is ended.
        folder: where NCCL leaves its record of the last collectives, unless the environment says so already.
    """

    def __init__(
        self, world: World, hang_seconds: float, tell: Callable[[str], None], folder: Path | None = None
    ) -> None:
        if folder is not None:
            os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "nccl_trace_rank_"))
        self.world, self.limit, self.tell = world, hang_seconds, tell
        self.watched = world.size > 1 and hang_seconds > 0
        self.before = (world.rank - 1) % world.size
        self.host, self.system, self.main = socket.gethostname(), processes.system(), threading.main_thread().ident
        self.idle = self.silent = self.unanswered = 0.0
        self.beats, self.asking, self.leaving = 0, False, False
        self.heard: bytes | None = None
        self.stack: tuple[int, ...] = ()
        self.done, self.threads = threading.Event(), list[threading.Thread]()

    def __enter__(self) -> "Watchdog":
        self.launchers = processes.launchers()
        if self.watched:
            self.store = _connect()
            with suppress(RuntimeError):  # who this is, before anything can happen to it
                self._set(self._beat())
        works = [self._look, self._speak] if self.watched else [self._look] if self.launchers else []
        self.threads = [threading.Thread(target=work, name="watchdog", daemon=True) for work in works]
        for thread in self.threads:
            thread.start()
        if self.watched:
            signals.last_words.append(self._farewell)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # A collective fails where another rank has died: then the threads will say so, and end this one.
        if self.watched and error is not None and not isinstance(error, ParlanceError) and _in_collective(at):
            self.leaving = True
            self.done.wait(SILENT + 3 * BEAT)
        self.done.set()
        if self.watched:
            signals.last_words.remove(self._farewell)
        for thread in self.threads:
            thread.join(GRACE)
        if self.watched and not self.threads[1].is_alive():
            with suppress(RuntimeError):
                self._leave(error.exit_code if isinstance(error, ParlanceError) else int(error is not None))

    # ------------------------------------------------------------- this process

    def _look(self) -> None:
        last = time.monotonic()
        while not self.done.wait(LOOK):
            passed, last = min(time.monotonic() - last, 2 * LOOK), time.monotonic()
            if any(not processes.alive(launcher) for launcher in self.launchers):
                self.launchers = []
                os.kill(os.getpid(), signal.SIGUSR1)
            stack, own = self._stack(), {thread.native_id for thread in self.threads}
            still = stack == self.stack and not processes.runs(os.getpid(), own)
            if still and self.idle > self.limit / 2:  # children are dear to find
                still = not any(processes.runs(child.pid) for child in processes.children())
            self.idle, self.stack = self.idle + passed if still else 0.0, stack
            self.unanswered = self.unanswered + passed if self.asking else 0.0
            if self.unanswered > SILENT:
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                self._end(f"rank 0, or who else keeps the store at {where}, does not answer", print_it=self._second())

    def _stack(self) -> tuple[int, ...]:
        """Where the main thread stands; numbers alone, because a frame that is kept keeps its tensors."""
        places = ((id(one.f_code), one.f_lasti) for one in _frames(sys._current_frames().get(self.main or 0)))
        return (_sign, *(number for place in places for number in place))

    def _second(self) -> bool:
        return self.world.rank == 1

    # ------------------------------------------------------------ other processes

    def _speak(self) -> None:
        lost = 0.0
        last = time.monotonic()
        while not self.done.wait(BEAT):
            passed, last = min(time.monotonic() - last, 2 * BEAT), time.monotonic()
            try:
                self.asking = True
                self._round(passed)
                self.asking, lost = False, 0.0
            except RuntimeError:  # the process that keeps the store has ended
                self.asking, lost = False, lost + passed
                if lost > GRACE:
                    self._end("rank 0, or who else keeps the store of the ranks, is gone", print_it=self._second())

    def _round(self, passed: float) -> None:
        self._set(self._beat())
        wanted = (VERDICT, SIGNAL, str(self.before))
        there = [name for name in wanted if self.store.check([name])]
        found = dict(zip(there, self.store.multi_get(there), strict=True)) if there else {}
        if VERDICT in found:
            verdict = json.loads(found[VERDICT])
            self._end(verdict["text"], verdict["code"], print_it=False)
        if SIGNAL in found:
            signals.pass_on()
        elif signals.received():
            self.store.set(SIGNAL, "1")
        self._hear(found.get(str(self.before)), passed)
        if self.idle >= self.limit and not self.leaving:
            self._judge()

    def _hear(self, beat: bytes | None, passed: float) -> None:
        """How is the rank before this one?"""
        self.silent, self.heard = self.silent + passed if beat == self.heard else 0.0, beat
        unknown = {"host": "an unknown host", "system": None, "pid": None, "left": None}
        told: dict[str, Any] = json.loads(beat) if beat else unknown
        who, pid = f"rank {self.before} on {told['host']}", told["pid"]
        visible = told["system"] == self.system
        process = processes.living(pid) if visible else None
        if told["left"]:
            if self.silent > GRACE:
                self._verdict(f"{who} has left with exit code {told['left']}", told["left"])
        elif told["left"] is None and visible and process is None and self.silent >= BEAT:
            self._verdict(f"{who} (pid {pid}) is gone: killed, or out of memory")
        elif told["left"] is None and self.silent > SILENT:
            stopped = process is not None and processes.state(process) == psutil.STATUS_STOPPED
            what = "is stopped" if stopped else "tells nothing any more, it or its host was stopped or is gone"
            self._verdict(f"{who} (pid {pid}) {what}")

    def _judge(self) -> None:
        """This rank stands still: because it sleeps, or because all ranks wait for each other?"""
        here = self._beat()
        if self._stack() != self.stack:  # it has gone on since it was last looked at
            return
        # NCCL looks after its own collectives, and may take longer to connect a thousand ranks.
        if here["waits"] and (self.world.rank or self.world.device.type == "cuda"):
            return
        names = [str(rank) for rank in range(self.world.size)]
        beats = {name: json.loads(self.store.get(name)) for name in names if self.store.check([name])}
        beats[str(self.world.rank)] = here
        if here["waits"] and not (
            len(beats) == len(names) and all(one["waits"] and one["idle"] > 0.75 * self.limit for one in beats.values())
        ):
            return
        first = [] if here["waits"] else [f"rank {self.world.rank} on {self.host} stands still at {here['at']}"]
        places: dict[str, list[str]] = {}
        for name, one in beats.items():
            if here["waits"] or name != str(self.world.rank):
                does = "waits" if one["waits"] else "is"
                places.setdefault(f"on {one['host']} {does} at {one['at']}", []).append(name)
        others = [f"rank {', '.join(ranks)} {place}" for place, ranks in list(places.items())[:4]]
        why = [f"all ranks wait for each other for {self.limit:g} s"] if here["waits"] else []
        self._verdict("; ".join([*why, *first, *others]))

    def _verdict(self, text: str, code: int = EXIT_REQUEUE) -> None:
        """Ends the job, if nobody else has; who has does it for this rank, too."""
        mine = json.dumps({"text": text, "code": code, "by": self.world.rank})
        first = self.store.compare_set(VERDICT, "", mine).decode() == mine
        told = text if first else json.loads(self.store.get(VERDICT))["text"]
        self._end(told, code, print_it=first)

    def _farewell(self, text: str) -> bool:
        """This rank ends by a signal, and the others with it; whether it was the first to say so."""
        first: list[bool] = []
        verdict = json.dumps({"text": text, "code": EXIT_REQUEUE, "by": self.world.rank})

        def tell() -> None:
            first.append(self.store.compare_set(VERDICT, "", verdict).decode() == verdict)

        teller = threading.Thread(target=tell, daemon=True)  # the store may not answer any more
        teller.start()
        teller.join(GRACE)
        if self.world.rank == 0:
            time.sleep(2 * BEAT)  # the others read it here
        return first == [True]

    def _end(self, text: str, code: int = EXIT_REQUEUE, print_it: bool = True) -> NoReturn:
        if print_it:
            again = ": run the same command again to continue" if code == EXIT_REQUEUE else ""
            with suppress(OSError):
                os.write(2, f"error: {text}{again}\n".encode())
            with suppress(Exception):  # the disk, too, may be what everything waits for
                self.tell(text)
        if self.world.rank == 0:
            time.sleep(2 * BEAT)  # the others read it here
        os._exit(code)

    def _beat(self, left: int | None = None) -> dict[str, Any]:
        frame = sys._current_frames().get(self.main or 0)
        waits = frame is not None and any(part in frame.f_code.co_filename for part in COLLECTIVE)
        self.beats += 1
        return {
            "count": self.beats, "host": self.host, "system": self.system, "pid": os.getpid(), "idle": self.idle,
            "waits": waits, "at": place(frame), "left": left,
        }  # fmt: skip

    def _set(self, beat: dict[str, Any]) -> None:
        self.store.set(str(self.world.rank), json.dumps(beat))

    def _leave(self, code: int) -> None:
        """Says that this rank has ended by itself; rank 0 waits a little for the others, who may read in its store."""
        self._set(self._beat(code))
        deadline = time.monotonic() + GRACE
        for rank in range(self.world.size if self.world.rank == 0 else 0):
            while time.monotonic() < deadline and self._here(str(rank)):
                time.sleep(0.05)

    def _here(self, name: str) -> bool:
        return self.store.check([name]) and json.loads(self.store.get(name))["left"] is None


def place(frame: FrameType | None) -> str:
    """`torch/x.py:12 in all_reduce (`work.wait()`), called at pretrain/loop.py:200 in global_counts`."""
    if frame is None:
        return "an unknown place"
    own = next((one for one in _frames(frame) if _in_root(one) and "/.venv/" not in one.f_code.co_filename), frame)
    line = linecache.getline(frame.f_code.co_filename, _number(frame)).strip()
    code = f" (`{line:.80}`)" if line else ""
    return f"{_name(frame)}{code}{f', called at {_name(own)}' if own is not frame else ''}"


def _connect() -> Any:
    """A connection of its own to the store: that of the process group may be waiting."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENT))
    return dist.PrefixStore(f"parlance/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _frames(frame: FrameType | None) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _number(frame: FrameType) -> int:
    """The line; 0 where there is none, as between two of them."""
    return frame.f_lineno or 0


def _in_root(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(str(ROOT))


def _name(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    short = file.removeprefix(f"{ROOT}/") if _in_root(frame) else file
    return f"{short.rpartition('site-packages/')[2]}:{_number(frame)} in {frame.f_code.co_name}"


def _in_collective(at: TracebackType | None) -> bool:
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and any(part in at.tb_frame.f_code.co_filename for part in COLLECTIVE)

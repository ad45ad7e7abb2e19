"""A step is one command of a study; a queue runs those that are not done, several at once, until the time is over.

A step that ended well leaves a stamp. Its key follows from its command and from the keys of what it needs, so that a
changed study runs again what the change concerns and nothing else. What is stopped is resumed by its own command.
"""

import ctypes
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pretrain.checkpoints.commit import disk_errors
from pretrain.data.files import write_atomic
from pretrain.errors import EXIT_REQUEUE
from pretrain.parsing import read_json
from pretrain.signals import Signals

PYTHON = "python"  # in a command: this interpreter
POLL = 0.2  # seconds
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
PATIENCE = 120.0  # seconds for a step to save once it was told to stop


@dataclass(frozen=True)
class Step:
    """One command. needs: what must be done before. output: takes its stdout. makes: a file it writes itself.

    alone: nothing else runs beside it, and it has all cores.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple["Step", ...] = ()
    output: Path | None = None
    makes: Path | None = None
    alone: bool = False

    @cached_property
    def key(self) -> str:
        content = [*self.command, str(self.output), *(need.key for need in self.needs)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def line(self) -> str:
        """The command as a person types it."""
        return shlex.join(self.command) + (f" > {shlex.quote(str(self.output))}" if self.output else "")


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen[bytes]
    started: float
    log: Path


@dataclass
class Queue:
    """Runs steps in `folder`, which gets `steps/` with stamps and `logs/`.

    jobs: steps at once; each gets its share of `threads`. deadline: of `time.monotonic`, after which nothing begins and
    what runs is told to save and end. failed: {name: exit code}.
    """

    folder: Path
    jobs: int
    threads: int
    deadline: float
    failed: dict[str, int] = field(default_factory=dict)
    stopped: bool = False

    def run(self, steps: Sequence[Step]) -> list[Step]:
        """Runs `steps`, the earlier ones first, and returns those that are not done.

        A step that fails is told, and what needs it is left; the rest goes on. SIGTERM and SIGUSR1 end it as the
        deadline does; `stopped` then says so.
        """
        running: list[_Running] = []
        _libc()  # loaded here, not between fork and exec
        with Signals() as signals:
            try:
                while True:
                    running = [one for one in running if not self._ended(one)]
                    self.stopped = signals.received
                    if self.stopped or time.monotonic() > self.deadline:
                        break
                    while (step := self._next(steps, running)) is not None:
                        running.append(self._start(step))
                    if not running:
                        break
                    time.sleep(POLL)
            finally:
                self._stop(running)
        return [step for step in steps if not self.done(step)]

    def stamp(self, step: Step) -> dict[str, Any] | None:
        """What the step left when it ended well; None where it did not, or was another then."""
        path = self._stamp(step)
        content = read_json(path) if path.exists() else {}
        return content if isinstance(content, dict) and content.get("key") == step.key else None

    def done(self, step: Step) -> bool:
        files = [path for path in (step.output, step.makes) if path is not None]
        return self.stamp(step) is not None and all(path.exists() for path in files)

    def _next(self, steps: Sequence[Step], running: Sequence[_Running]) -> Step | None:
        """The first step that may begin now. One that wants to be alone keeps those after it from beginning."""
        if len(running) >= self.jobs or any(one.step.alone for one in running):
            return None
        begun = {one.step.name for one in running}
        for step in steps:
            if step.name in begun or step.name in self.failed or self.done(step):
                continue
            if all(self.done(need) for need in step.needs):
                return None if step.alone and running else step
        return None

    def _start(self, step: Step) -> _Running:
        log = self.folder / "logs" / f"{step.name}.log"
        with disk_errors(log):
            for path in (log, self._stamp(step), *([step.output] if step.output else [])):
                path.parent.mkdir(parents=True, exist_ok=True)
        print(f"begin {step.name}\n  $ {step.line}", file=sys.stderr, flush=True)
        command = [sys.executable if word == PYTHON else word for word in step.command]
        threads = str(self.threads if step.alone else max(1, self.threads // self.jobs))
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        with ExitStack() as stack:
            told = stack.enter_context(log.open("ab"))
            output = stack.enter_context(_half(step.output).open("wb")) if step.output else told
            # A session of its own: Ctrl-C reaches this process, which then tells its steps to save.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=told, env=environment,
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
        return _Running(step, process, time.monotonic(), log)

    def _ended(self, one: _Running) -> bool:
        """Whether it has ended; then it has its stamp, or is told as failed."""
        code = one.process.poll()
        if code is None:
            return False
        seconds = time.monotonic() - one.started
        if code == 0:
            if one.step.output:
                _half(one.step.output).replace(one.step.output)
            took = {"key": one.step.key, "command": one.step.line, "seconds": round(seconds, 1)}
            write_atomic(self._stamp(one.step), json.dumps(took).encode())
            print(f"done  {one.step.name} in {seconds:.0f} s", file=sys.stderr, flush=True)
        elif code == EXIT_REQUEUE:
            print(f"saved {one.step.name}", file=sys.stderr, flush=True)
        else:
            self.failed[one.step.name] = code
            print(f"FAILED {one.step.name} with exit code {code}: {one.log}", file=sys.stderr, flush=True)
        return True

    def _stop(self, running: Sequence[_Running]) -> None:
        for one in running:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + PATIENCE
        for one in running:
            try:
                one.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(one.process.pid, signal.SIGKILL)
                one.process.wait()
            if one.process.returncode in (0, EXIT_REQUEUE):
                self._ended(one)

    def _stamp(self, step: Step) -> Path:
        return self.folder / "steps" / f"{step.name}.json"


def _end_with_parent() -> None:
    """Between fork and exec: the kernel sends SIGTERM when the parent dies, even if it is killed."""
    _libc().prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _half(path: Path) -> Path:
    """Where an output is until the step has ended."""
    return path.with_name(f"{path.name}.half")

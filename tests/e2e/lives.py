"""Lives of a run on two ranks that end by SIGKILL at any moment, many of them in little time.

Most of a short life is the import of torch and deepspeed. Here one process imports them and forks the ranks, so that a
life costs a second or two; `launched` starts ranks as people do, by torchrun or the deepspeed launcher.
"""

import errno
import fcntl
import importlib
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.seal import verify
from tests.pretrain.runs import ROOT, environment

started: "list[Forked]" = []  # by the test that runs; tests/e2e/conftest.py ends what it leaves
RANKS = 2
PATIENCE = 120.0  # seconds after which something is stuck, on a busy machine too
PRELOAD = ["torch", "deepspeed", "torch.utils.tensorboard", "pretrain.__main__", "pretrain.train", "tests.e2e.lives"]


class Forked:
    """Two ranks forked from a process that has everything imported; nobody ends the one when the other dies."""

    def __init__(
        self,
        log: Path,
        *arguments: Any,
        before: Callable[[], None] | None = None,
        ranks: int = RANKS,
        program: str = "pretrain",
    ) -> None:
        """before: called in each rank first; must be importable."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        inherited, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT)
        os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
        port, words = free_port(), [str(word) for word in arguments]
        self.log, self.ranks = log, []
        # A pipe, because limits on files must not hold for what is printed.
        pipe = log.with_suffix(".pipe")
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        self._pipe = os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
        fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
        for rank in range(ranks):
            process = context.Process(target=_live, args=(rank, ranks, port, pipe, program, words, before))
            process.start()
            self.ranks.append(process)
        started.append(self)
        if inherited is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = inherited

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self.ranks[rank].kill()

    def wait(self) -> list[int]:
        """The exit codes; fails the test when a rank is stuck."""
        deadline = time.monotonic() + PATIENCE
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        self.kill(stuck)
        assert not stuck, f"ranks {stuck} are stuck:\n{self.printed()}"
        return [int(process.exitcode or 0) for process in self.ranks]

    def printed(self) -> str:
        with self.log.open("ab") as file:
            while chunk := self._pipe.read(1 << 16):
                file.write(chunk)
        return self.log.read_text(errors="replace")


class Launched:
    """Two ranks under a launcher, which has to end the one when the other dies."""

    def __init__(self, log: Path, launcher: str, *arguments: Any) -> None:
        folder, port = Path(sys.executable).parent, str(free_port())
        command = {
            "torchrun": [folder / "torchrun", "--nproc_per_node", RANKS, "--master_port", port, "-m", "pretrain"],
            "deepspeed": [folder / "deepspeed", "--num_gpus", RANKS, "--master_port", port, "--module", "pretrain"],
        }[launcher]
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [str(word) for word in (*command, *arguments)], cwd=ROOT, env=environment(), stdout=out, stderr=out
            )
        self._launcher = psutil.Process(self.process.pid)

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self, ranks: Sequence[int]) -> None:
        """Kills ranks, as soon as there are any, and not the launcher."""
        found = 0
        while not found and self.alive():
            for child in self._launcher.children(recursive=True):
                try:
                    if "pretrain" in child.cmdline() and child.environ().get("RANK") in map(str, ranks):
                        child.kill()
                        found += 1
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
            time.sleep(0.01)

    def wait(self) -> list[int]:
        try:
            family = self._launcher.children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        orphans = [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        for process in (*orphans, *([self._launcher] if code is None else [])):
            process.kill()
        assert code is not None, f"the launcher is stuck:\n{self.printed()}"
        assert not orphans, f"the launcher left ranks behind:\n{self.printed()}"
        return [code] * RANKS

    def printed(self) -> str:
        return self.log.read_text(errors="replace")


def killed(start: Callable[[], Forked | Launched], run: Path, moment: str, ranks: Sequence[int]) -> int:
    """Starts a life, kills `ranks` of it at a random moment of a kind, and returns the newest intact step after it.

    moment: `any` time from the start on, inside a `save`, inside the `deletion` of an old commit, or after `progress`.
    """
    before = newest(run)
    life = start()
    _wait_for(life, run, moment, before)
    ended = not life.alive()
    life.kill(ranks)
    codes = life.wait()
    if ended and ("EADDRINUSE" in life.printed() or os.strerror(errno.EADDRINUSE) in life.printed()):
        return killed(start, run, moment, ranks)
    assert not ended, f"ended by itself with {codes}:\n{life.printed()[-4000:]}"
    assert all(codes), codes
    after = newest(run)
    assert after >= before, f"lost the commit of step {before}, the newest intact one is of {after}"
    return after


def _wait_for(life: Forked | Launched, run: Path, moment: str, before: int) -> None:
    folder, deadline = run / "checkpoints", time.monotonic() + PATIENCE / 2
    if moment == "any":
        deadline = time.monotonic() + random.uniform(0.0, 4.0)
    wanted = {"save": "staging-", "deletion": "trash-"}.get(moment)
    while life.alive() and time.monotonic() < deadline:
        names = names_in(folder)
        if wanted and any(name.startswith(wanted) for name in names) and any(_step(name) > before for name in names):
            time.sleep(random.uniform(0.0, 0.03))
            return
        if moment == "progress" and max(map(_step, names), default=0) > before:
            time.sleep(random.uniform(0.0, 0.5))
            return
        time.sleep(0.0005)


def newest(run: Path) -> int:
    """Step of the newest intact commit as it lies there, without any repair; 0 where there is none.

    A staging directory with an intact manifest is a commit: the next start puts it in place.
    """
    folder = run / "checkpoints"
    good = [name for name in names_in(folder) if name.startswith(("step-", "staging-")) and not verify(folder / name)]
    return max((_step(name.replace("staging", "step")) for name in good), default=0)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _step(name: str) -> int:
    return int(name[5:]) if name.startswith("step-") else 0


def a_second_later(run: Path) -> None:
    """Readers order event files by name and names tell seconds: no two lives of one second."""
    files = list((run / "tb").glob("events.out.tfevents.*"))
    last = max((int(path.name.split(".")[3]) for path in files), default=0)
    while time.time() < last + 1:
        time.sleep(0.02)


def final_files(run: Path, step: int) -> dict[str, bytes]:
    """Weights, optimizer, generators and progress of a commit, as bytes."""
    commit = Store(run).commits()[-1]
    assert commit.name == f"step-{step:08d}" and not verify(commit)
    return {path.name: path.read_bytes() for path in commit.iterdir()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _live(
    rank: int, ranks: int, port: int, pipe: Path, program: str, words: list[str], before: Callable[[], None] | None
) -> None:
    out = os.open(pipe, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    main = importlib.import_module(f"{program}.__main__").main
    sys.argv = [program, *words]

    if before is not None:
        before()
    sys.exit(main())

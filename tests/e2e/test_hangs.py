"""No rank waits for ever: one is killed, stopped, asleep or elsewhere, and the others end in a minute, saying why."""

import hashlib
import os
import pydoc
import random
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain import watchdog
from pretrain.runs import read_events
from tests.e2e.lives import PATIENCE, Forked, final_files, newest
from tests.pretrain.runs import make_data, write_config

MINUTE = 60.0
LONG = ("train.steps=100000", "train.save_every=5", "train.log_every=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"), 150)


def reach(life: Forked, run: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while newest(run) < step:
        assert life.alive() and time.monotonic() < deadline, life.printed()
        time.sleep(0.02)


def ends(life: Forked, rank: int) -> float:
    """Seconds until the other rank has ended; `rank`, which may be stopped, is killed then."""
    began, other = time.monotonic(), life.ranks[1 - rank]
    other.join(MINUTE)
    seconds = time.monotonic() - began
    life.kill([rank])
    assert not other.is_alive(), life.printed()
    assert other.exitcode == 85, life.printed()
    return seconds


def told(life: Forked, run: Path) -> str:
    """The one line of the job that was ended, which is in the journal, too."""
    (line,) = [line for line in life.printed().splitlines() if line.startswith("error: ")]
    text = line.removeprefix("error: ").removesuffix(": run the same command again to continue")
    assert text != line.removeprefix("error: "), line
    event = read_events(run)[-1]
    assert (event["event"], event["kind"], event["message"]) == ("error", "LostRank", text)
    return text


def quick() -> None:
    """Times at which a busy machine is still no failure, and a test no long wait."""
    watchdog.SILENT = 8.0


@pytest.mark.fault("kill of one rank", trials=1)
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_is_named(rank: int, data: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    life = Forked(tmp_path / "log", "train", config, *LONG, "train.save_every=1")
    reach(life, run, 1)  # before the others have asked for it
    life.kill([rank])
    assert ends(life, rank) < MINUTE
    named = f"rank {rank} on {socket.gethostname()} (pid {life.ranks[rank].pid}) is gone"
    assert told(life, run).startswith(named if rank else "rank 0, or who else keeps the store"), life.printed()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.fault("kill of one rank", trials=25)
def test_kills_of_one_rank_at_any_moment(rank: int, data: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    for _ in range(25):
        kept = newest(run)
        life = Forked(tmp_path / "log", "train", config, *LONG, "train.save_every=2")
        reach(life, run, kept + 2)
        time.sleep(random.uniform(0.0, 1.0))
        life.kill([rank])
        assert ends(life, rank) < MINUTE
        assert newest(run) >= kept + 2
    kept = newest(run)
    life = Forked(tmp_path / "last.log", "train", config, f"train.steps={kept + 1}")
    assert life.wait() == [0, 0] and newest(run) == kept + 1, life.printed()


def stop(rank: int, data: Path, folder: Path, before: Any) -> None:
    """Stops a rank at a random moment and lets the run go on to its end."""
    config, run = write_config(folder, data), folder / "runs" / "tiny"
    life = Forked(folder / "log", "train", config, *LONG, before=before)
    reach(life, run, 5)
    time.sleep(random.uniform(0.0, 0.5))
    os.kill(int(life.ranks[rank].pid or 0), signal.SIGSTOP)
    assert ends(life, rank) < MINUTE
    text = told(life, run)
    assert text.endswith("is stopped") or (rank == 0 and text.endswith("does not answer")), text
    kept = newest(run)
    life = Forked(folder / "last.log", "train", config, f"train.steps={kept + 1}")
    assert life.wait() == [0, 0], life.printed()
    assert newest(run) == kept + 1


@pytest.mark.timeout(600)
@pytest.mark.fault("stop of one rank", trials=1)
def test_a_rank_that_is_stopped(data: Path, tmp_path: Path) -> None:
    stop(1, data, tmp_path, quick)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("trial", range(10))
@pytest.mark.fault("stop of one rank", trials=1)
def test_a_rank_that_is_stopped_ten_times(trial: int, data: Path, tmp_path: Path) -> None:
    stop(trial % 2, data, tmp_path, None)


def lost(name: str, how: str) -> None:
    """On rank 1 the fourth call never ends, or is preceded by a collective that no other rank takes part in."""
    watchdog.SILENT = 20.0
    if os.environ["RANK"] != "1":
        return
    owner, calls = pydoc.locate(name.rpartition(".")[0]), [0]
    true = getattr(owner, name.rpartition(".")[2])

    def elsewhere(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4 and how == "asleep":
            time.sleep(10 * MINUTE)
        if calls[0] == 4:
            from torch import distributed

            distributed.barrier()
        return true(*arguments, **named)

    setattr(owner, name.rpartition(".")[2], elsewhere)


@pytest.mark.parametrize(
    ("name", "how", "waits"),
    [
        ("pretrain.data.stream._MicroBatches.__getitem__", "asleep", r"distributed\.py:\d+ in _all_reduce"),
        pytest.param(
            "pretrain.engine.local.LocalEngine.step", "asleep", r"engine/local\.py:\d+ in step", marks=pytest.mark.slow
        ),
        ("pretrain.loop.global_means", "elsewhere", r"distributed\.py:\d+ in _all_reduce"),
    ],
)
def test_the_rank_the_call_and_the_line_are_named(name: str, how: str, waits: str, data: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    life = Forked(tmp_path / "log", "train", config, *LONG, "train.hang_seconds=6", before=partial(lost, name, how))
    assert life.wait() == [85, 85], life.printed()
    text, host = told(life, run), re.escape(socket.gethostname())
    here = r"tests/e2e/test_hangs\.py:\d+ in elsewhere \(`{}`\)"
    if how == "asleep":
        sleeps = here.format(re.escape("time.sleep(10 * MINUTE)"))
        assert re.match(
            rf"rank 1 on {host} stands still at {sleeps}; rank 0 on {host} waits at torch/distributed", text
        ), text
    else:
        assert text.startswith("all ranks wait for each other for 6 s; rank 0 on "), text
        assert re.search(rf"rank 1 on {host} waits at torch/distributed/\S+:\d+ in barrier", text), text
    assert re.search(rf"rank 0 on {host} waits at torch/distributed/.*, called at pretrain/{waits}", text), text


def test_an_honest_rank_is_left_alone(data: Path, tmp_path: Path) -> None:
    """It computes at one line, or waits for a child that does, for longer than a rank may stand still."""
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    life = Forked(tmp_path / "log", "train", config, "train.hang_seconds=5", before=busy)
    assert life.wait() == [0, 0], life.printed()
    assert [event["event"] for event in read_events(run)][-1] == "finish" and final_files(run, 6)


def busy() -> None:
    """Rank 1 works for nine seconds at one line, then waits nine seconds for a child that works."""
    from pretrain.engine.local import LocalEngine

    if os.environ["RANK"] != "1":
        return
    true, calls = LocalEngine.step, [0]

    def slowly(self: LocalEngine, lr: float) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            until = time.monotonic() + 9
            while time.monotonic() < until:
                hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
        if calls[0] == 4:
            work = "import time\nuntil = time.monotonic() + 9\nwhile time.monotonic() < until: pass"
            subprocess.run([sys.executable, "-c", work], check=True)
        return true(self, lr)

    LocalEngine.step = slowly  # type: ignore[method-assign]


def test_a_place_between_two_lines() -> None:
    """CPython has instructions that belong to no line, at which a thread may be looked at."""
    code = SimpleNamespace(co_filename=__file__, co_name="between")
    assert watchdog.place(SimpleNamespace(f_code=code, f_lineno=None, f_back=None)).endswith(
        "test_hangs.py:0 in between"
    )  # type: ignore[arg-type]

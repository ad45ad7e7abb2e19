"""The lock of a run directory: who may take it when, on file systems with and without locks."""

import errno
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from pretrain import slurm, watchdog
from pretrain.checkpoints import holder
from pretrain.checkpoints.commit import Store
from pretrain.errors import CheckpointError

HERE = socket.gethostname()
HOLD = """
import sys
from pretrain.checkpoints.commit import Store
store = Store(sys.argv[1])
store.lock()
print("held", flush=True)
sys.stdin.readline()
"""


def job_of(monkeypatch: pytest.MonkeyPatch, job: str, running: bool | None = None) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setattr(slurm, "is_running", lambda job: running)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(holder.fcntl, "lockf", fail)


def test_the_holder_is_named_with_host_pid_and_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_of(monkeypatch, "41")
    store = Store(tmp_path)
    store.lock()
    assert (tmp_path / "lock").read_text() == f"host {HERE} pid {os.getpid()} job 41\n"
    store.unlock()
    assert (tmp_path / "lock").read_text() == "", "where there are no locks, nobody is there now"


def test_a_second_job_is_told_who_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = os.environ | {"SLURM_JOB_ID": "41"}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        job_of(monkeypatch, "42")
        with pytest.raises(CheckpointError, match=rf"is in use by host {HERE} pid {other.pid} job 41$"):
            Store(tmp_path).lock()
        other.kill()
    Store(tmp_path).lock()


@pytest.mark.parametrize(("job", "running"), [("41", True), ("42", False)])
def test_a_lock_of_a_dead_host_is_waited_for(
    job: str, running: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier life of this job, or a job that Slurm says is over: their file server drops the lock in a while."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None and other.stdout.readline() == "held\n"
        (tmp_path / "lock").write_text("host gone pid 7 job 41\n")
        job_of(monkeypatch, job, running)
        waits: list[float] = []

        def drop(seconds: float) -> None:
            waits.append(seconds)
            other.kill()
            other.wait()

        monkeypatch.setattr(time, "sleep", drop)
        signs = watchdog._sign
        Store(tmp_path).lock()
        assert len(waits) == 1 and watchdog._sign == signs + 1, "a watched rank waits on purpose"


def test_a_lock_is_never_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        (tmp_path / "lock").write_text("host gone pid 7 job 41\n")
        job_of(monkeypatch, "41")
        monkeypatch.setattr(holder, "LEASE", 0.0)
        with pytest.raises(CheckpointError, match="is in use by host gone pid 7 job 41"):
            Store(tmp_path).lock()
        other.kill()


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"host {HERE} pid 4194305",  # beyond any pid
        f"host {HERE} pid MINE",  # what a container that was started again finds
        "host gone pid 7 job 41",
        "host gone pid 7 job 40",
    ],
)
def test_without_locks_a_stale_text_is_recovered(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_locks: None
) -> None:
    (tmp_path / "lock").write_text(text.replace("MINE", str(os.getpid())))
    job_of(monkeypatch, "41", running=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = Store(tmp_path)
        store.lock()
    assert f"pid {os.getpid()} job 41" in (tmp_path / "lock").read_text()


def test_without_locks_a_living_holder_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_locks: None) -> None:
    job_of(monkeypatch, "41", running=True)
    for text in (f"host {HERE} pid {os.getppid()}", "host other pid 7 job 40"):
        (tmp_path / "lock").write_text(text)
        with pytest.raises(CheckpointError, match=f"is in use by {text}"):
            Store(tmp_path).lock()


def test_without_locks_and_slurm_people_are_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_locks: None
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "lock").write_text("host other pid 7")
    with pytest.warns(UserWarning, match="without locks and was in use by host other pid 7"):
        Store(tmp_path).lock()

"""The lock of a run directory: taking it, and who holds it, asked of the kernel without taking it."""

import fcntl
import os
import re
import socket
import struct
import time
import warnings
from pathlib import Path
from typing import IO

from pretrain import slurm
from pretrain.errors import NO_LOCK_ERRNOS, CheckpointError
from pretrain.watchdog import sign_of_life

LEASE = 150.0  # seconds: NFS frees the locks of a dead client after 90
_TEXT = re.compile(r"host (\S+) pid ([0-9]+)(?: job (\S+))?")
# struct flock of <fcntl.h> on 64-bit Linux: type, whence, start, length, pid.
_FLOCK = "hhqqi4x"


class NoLocks(Exception):
    """The file system has no locks, so nobody knows who trains there."""


def in_use(run_dir: str | Path) -> str | None:
    """For people: who uses `run_dir`, or that it is not known; None where nobody does."""
    try:
        by = holder(run_dir)
    except NoLocks:
        return "perhaps in use: this file system has no locks"
    return f"in use by {by}" if by else None


def holder(run_dir: str | Path) -> str | None:
    """What the lock file says of the job that holds `run_dir`; None where no living process holds it.

    Taking the lock for a moment would turn a job away that starts in that very moment; this only looks. It must not be
    called by the job itself, whose lock ends when any file that it opened on it is closed.

    Raises:
        NoLocks: the file system cannot tell.
    """
    try:
        descriptor = os.open(Path(run_dir) / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        try:
            asked = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if error.errno in NO_LOCK_ERRNOS:
                raise NoLocks from None
            return None
        if struct.unpack(_FLOCK, asked)[0] == fcntl.F_UNLCK:
            return None
        return file.read(200).decode(errors="replace").strip() or "another process"


def myself() -> str:
    """What the lock file says of this process."""
    job = slurm.job_id(os.environ)
    return f"host {socket.gethostname()} pid {os.getpid()}" + (f" job {job}" if job else "")


def take(file: IO[str], run_dir: Path) -> None:
    """Locks the open lock file of `run_dir` for this process; closing it, or the death of the process, gives it back.

    On a file system without locks the text in the file must do. A holder that is known to be dead, as an earlier life
    of this Slurm job on a host that is gone, is waited for until its file server drops the lock.

    Raises:
        CheckpointError: another living process holds it; the file is closed then.
    """
    deadline = time.monotonic() + LEASE
    while True:
        try:
            # A POSIX record lock: the kernel drops it when the process dies, on this host and over NFS, and
            # forked data workers do not inherit it. No pid has to be guessed alive.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            file.seek(0)
            by = file.read(200).strip()
            alive = is_alive(by)
            if error.errno in NO_LOCK_ERRNOS and not alive:
                if alive is None and by:
                    warnings.warn(
                        f"`{run_dir}` is on a file system without locks and was in use by {by}: make sure it ended",
                        stacklevel=3,
                    )
                return
            if alive is False and time.monotonic() < deadline:
                sign_of_life()
                time.sleep(1)
                continue
            file.close()
            raise CheckpointError(
                f"`{run_dir}` must be used by one job at a time, is in use by {by or 'another process'}"
            ) from None


def is_alive(text: str) -> bool | None:
    """Whether the process still lives that wrote `text` into a lock file; None where nobody can tell."""
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    host, pid, job = match.groups()
    if host == socket.gethostname():
        # Its number may be another's by now; in a container it is often this very process's.
        there = Path(f"/proc/{pid}").exists() and int(pid) != os.getpid()
        return there and not (job and slurm.is_running(job) is False)
    if job and job == slurm.job_id(os.environ):
        return False  # a job runs once at a time: that was an earlier life of this one
    return slurm.is_running(job) if job else None

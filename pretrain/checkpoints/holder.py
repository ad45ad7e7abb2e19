"""Who trains in a run directory now, asked of the kernel without taking the lock."""

import fcntl
import os
import struct
from pathlib import Path

from pretrain.errors import NO_LOCK_ERRNOS

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

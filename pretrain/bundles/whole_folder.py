"""A folder that appears whole or not at all, also where several processes write to one place at the same time.

    .NAME.staging-xxxxxxxx   being written, by one process, which holds a lock on it; deleted by the next one if it died
    .NAME.trash-xxxxxxxx     what stood at NAME before

Each process has a staging folder of its own and renames it into place, so the last one wins and nothing is mixed.
"""

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain.checkpoints.commit import disk_errors

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


@contextmanager
def whole_folder(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Gives an empty folder to write into; at the end it is on disk and takes the place of `target`.

    check: called before anything stands at `target`; raises if what stands there then may not be replaced.

    Raises:
        DiskError: the disk is full, over quota or read-only.
    """
    with disk_errors(target):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        staging, held = _begin(target)
        try:
            yield staging
            for path in staging.iterdir():
                path.chmod(0o644)  # safetensors makes files that only their owner can read
                sync(path)
            sync(staging)
            check()
            _swap(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            os.close(held)
        sync(target.absolute().parent)


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begin(target: Path) -> tuple[Path, int]:
    """A new staging folder, and the descriptor that holds it until it is closed or this process dies."""
    while True:
        staging = _beside(target, "staging")
        staging.mkdir()
        with suppress(FileNotFoundError):  # swept by another process before it was held
            held = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with suppress(OSError):  # a file system without locks; nobody sweeps there either
                fcntl.flock(held, fcntl.LOCK_EX)
            if staging.exists():
                return staging, held
            os.close(held)


def _sweep(target: Path) -> None:
    """Deletes what processes that died have left beside `target`."""
    name = glob.escape(target.name)
    for left in [*target.parent.glob(f".{name}.staging*"), *target.parent.glob(f".{name}.trash*")]:
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        with suppress(OSError):  # in use, or nobody knows
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        os.close(descriptor)


def _swap(staging: Path, target: Path) -> None:
    """Moves `staging` to `target`, away what stands there, until no other process was faster."""
    while True:
        trash = _beside(target, "trash")
        with suppress(FileNotFoundError):
            target.rename(trash)
        try:
            staging.rename(target)
        except OSError as error:
            if error.errno in _TAKEN:
                continue
            raise
        finally:
            shutil.rmtree(trash, ignore_errors=True)
        return


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")

"""A file that is written for hours: piece by piece beside its place, so that whoever dies goes on where it was.

    OUT.partial         the pieces so far, in order
    OUT.partial.json    how much of it counts, and what it is a part of: {"identity", "lines", "bytes"}

The text of a piece reaches the disk before the record counts it, so that behind a kill or a power cut the record is
true and what lies beyond it is cut off. At the end the file is renamed into its place.
"""

import fcntl
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pretrain.bundles.whole_folder import sync
from pretrain.checkpoints.seal import read_json
from pretrain.data.files import as_disk_error, write_atomic
from pretrain.errors import NO_LOCK_ERRNOS, CheckpointError, DataError, UsageError

# What the record calls the content of the file that is read; any other entry of an identity is called by its own name.
INPUT, BUNDLE = "input", "bundle"


class Partial:
    """The part of `target` that exists; as a context, the right to write it.

    lines: of the input that it stands for.

    Args:
        identity: values that decide every byte of the target; a part of something else is not continued.
        restart: throw away what is there.
        keep: whether another process could go on. If not, nothing is left behind.

    Raises:
        UsageError: the part belongs to another identity, another process is writing it, or `target` is no place for a
            file.
        DataError: the part is shorter than its record says, or the record is broken.
        DiskError: the disk is full, over quota or read-only.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any], restart: bool = False, keep: bool = True) -> None:
        self.target, self.identity, self.keep = target, dict(identity), keep
        self.path = target.with_name(f"{target.name}.partial")
        self.record = target.with_name(f"{target.name}.partial.json")
        self.lines = self.bytes = 0
        try:
            check_place(target)
            target.absolute().parent.mkdir(parents=True, exist_ok=True)
            began = not self.path.exists()
            self.file = os.fdopen(_held(self.path), "r+b")
            try:
                if began or restart:
                    self.record.unlink(missing_ok=True)  # of a part that was finished
                self._continue()
                self.file.truncate(self.bytes)
                self.file.seek(self.bytes)
            except BaseException:
                self.file.close()
                raise
        except OSError as error:
            problem = as_disk_error(error, self.path)
            if problem is error:
                problem = UsageError(f"`{target}` cannot be written: {error.strerror}")
            raise problem from None

    def append(self, text: bytes, lines: int) -> None:
        """Adds a piece that stands for `lines` of the input."""
        try:
            self.file.write(text)
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise as_disk_error(error, self.path) from None
        self.lines, self.bytes = self.lines + lines, self.bytes + len(text)
        if self.keep:
            values = {"identity": self.identity, "lines": self.lines, "bytes": self.bytes}
            write_atomic(self.record, (json.dumps(values, indent=1) + "\n").encode())

    def finish(self) -> None:
        """Puts the file into its place."""
        try:
            # The part first: a record without one is of a file that is finished.
            self.path.replace(self.target)
            self.record.unlink(missing_ok=True)
            sync(self.target.absolute().parent)
        except OSError as error:
            raise as_disk_error(error, self.target) from None

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None and not (self.keep and self.lines):
            self.path.unlink(missing_ok=True)
        self.file.close()

    def _continue(self) -> None:
        if not self.record.exists():
            return
        try:
            values = read_json(self.record)
        except CheckpointError as error:
            raise DataError(f"{error}; `--restart` begins anew") from None
        lines, count, identity = values.get("lines"), values.get("bytes"), values.get("identity")
        if type(lines) is not int or type(count) is not int or min(lines, count) < 0 or not isinstance(identity, dict):
            raise DataError(f"`{self.record}` must have `identity`, `lines` and `bytes`; `--restart` begins anew")
        differences = [
            f"another `--{name}`" if name == INPUT else f"another {name}" if name == BUNDLE else
            f"`{name}` {identity.get(name)!r:.80}, not {self.identity.get(name)!r:.80}"
            for name in sorted({*identity, *self.identity})
            if identity.get(name) != self.identity.get(name)
        ]  # fmt: skip
        if differences:
            raise UsageError(
                f"`{self.path}` holds {lines} lines that were written with {' and '.join(differences)}: run the same "
                "command to go on, or `--restart` to begin anew"
            )
        size = os.fstat(self.file.fileno()).st_size
        if size < count:
            raise DataError(f"`{self.path}` must have at least {count} bytes, it has {size}; `--restart` begins anew")
        self.lines, self.bytes = lines, count


def check_place(target: Path) -> None:
    """Raises UsageError where no file can be at `target`, before anybody works for it."""
    above = next(one for one in target.absolute().parents if one.exists())
    if not above.is_dir():
        raise UsageError(f"`{target}` must be a file or new, to be written to; `{above}` is no folder")
    if target.exists() and not target.is_file():
        raise UsageError(f"`{target}` must be a file or new, to be written to")


def _held(path: Path) -> int:
    """A descriptor of the file at `path`, which no other process holds."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(f"`{path}` is being written by another process") from None
        except OSError as error:
            if error.errno not in NO_LOCK_ERRNOS:
                os.close(descriptor)
                raise
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise UsageError(f"`{path}` must be a plain file or absent")
        with suppress(FileNotFoundError):  # finished and moved away by its writer just now
            if path.stat().st_ino == found.st_ino:
                return descriptor
        os.close(descriptor)

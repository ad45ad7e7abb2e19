"""A checkpoint is committed or it does not exist: directories, hashes and one pointer, in plain Python.

    RUN/lock                        held by the job that writes here (released by the kernel when it dies)
    RUN/latest                      one line, the name of the last commit
    RUN/checkpoints/step-00000500   a commit: flat files and manifest.json, never changed again
    RUN/checkpoints/staging-...     being written
    RUN/checkpoints/trash-...       being deleted

Every process fsyncs and hashes the files it wrote; a commit checks that exactly those are there, writes the manifest,
renames the staging directory into place and then moves the pointer. From the manifest on it is durable: `recover`
finishes whatever a kill left behind, and deletes the rest. Deletion renames first, so that a half-deleted directory is
never taken for a commit. The manifest carries its own hash, so a flipped bit anywhere in a commit is found. Links are
never followed: a run directory may come from anyone.
"""

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from pretrain.checkpoints.holder import myself, take
from pretrain.checkpoints.seal import (
    MANIFEST,
    Described,
    check_staged,
    describe,
    manifest_bytes,
    number,
    verify,
)
from pretrain.errors import DISK_ERRNOS, FULL_ERRNOS, CheckpointError, DiskError, DiskFullError, ParlanceError
from pretrain.plain import open_plain

_COMMIT = re.compile(r"step-(\d{8,})")

Hook = Callable[[str, Path], None]
Signature = list[tuple[str, int, int, int]]  # of a directory that was verified: name, size, time, inode of each file


class Store:
    """The commits of one run directory. One process (rank 0) calls the methods; others write into staging and `seal`.

    Args:
        run_dir: folder of the run; created when something is written.
        hook: called with (operation, path) just before every operation that changes the disk; tests kill there.
    """

    def __init__(self, run_dir: str | Path, hook: Hook = lambda operation, path: None) -> None:
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "checkpoints"
        self._hook = hook
        self._lock: IO[str] | None = None
        self._verified: dict[str, Signature] = {}

    # ---------------------------------------------------------------- writing

    def begin(self, step: int) -> Path:
        """Creates an empty staging directory for the commit of `step` and returns it."""
        staging = self.folder / f"staging-{step:08d}"
        with disk_errors(staging):
            self._mkdir(self.run_dir)
            self._mkdir(self.folder)
            if staging.exists():
                self._discard(staging)
            self._mkdir(staging)
        return staging

    def seal(self, staging: Path, names: Iterable[str]) -> dict[str, Described]:
        """Size and hash of files in `staging` that the calling process wrote, after they have reached the disk."""
        with disk_errors(staging):
            return {name: self._seal(staging / name) for name in names}

    def commit(self, staging: Path, step: int, files: Mapping[str, Described]) -> Path:
        """Makes `files`, what every process has sealed, the latest commit; on return it survives a power loss.

        After a DiskError it may be called again, with the same arguments, once there is room.

        Raises:
            DiskError: the disk is full, over quota or read-only; earlier commits are intact.
            CheckpointError: `staging` lacks one of `files`, holds it in another size, or holds anything else.
        """
        with disk_errors(staging):
            sealed = manifest_bytes(step, dict(files))
            if os.path.lexists(staging) or not self._renamed(step, sealed):
                check_staged(staging, files)
                self._write(staging / MANIFEST, sealed)
                self._sync(staging)
            return self._publish(staging, step)

    def discard(self, staging: Path) -> None:
        """Deletes a staging directory that will not be committed, as far as the disk allows."""
        with contextlib.suppress(OSError):
            if staging.exists():
                self._discard(staging)

    def retain(self, keep: int, spared: Collection[str] = ()) -> list[str]:
        """Deletes what is older than the newest `keep` commits that verify; returns what went.

        A damaged commit is not counted, so it never takes the place of an intact one. spared: names that stay.
        """
        commits, intact = self.commits(), 0
        for path in reversed(commits):
            intact += self._good(path)
            if intact == keep:
                break
        old = commits[: commits.index(path)] if intact == keep else []
        old = [path for path in old if path.name not in spared]
        with disk_errors(self.folder):
            for path in old:
                self._discard(path)
        return [path.name for path in old]

    # ---------------------------------------------------------------- reading

    def commits(self) -> list[Path]:
        """Every directory with the name of a commit, oldest first, verified or not."""
        if not self.folder.is_dir():
            return []
        named = [(match, path) for path in self.folder.iterdir() if (match := _COMMIT.fullmatch(path.name))]
        found = [(int(match[1]), path) for match, path in named if _is_directory(path)]
        return [path for _, path in sorted(found)]

    def intact(self) -> list[Path]:
        """Every commit that verifies, oldest first."""
        return [path for path in self.commits() if self._good(path)]

    def latest(self) -> Path | None:
        """The newest commit that verifies; None if nothing was ever committed.

        Raises:
            CheckpointError: there are commits and every one of them is damaged.
        """
        commits = self.commits()
        for path in reversed(commits):
            if self._good(path):
                return path
        if commits:
            problem = verify(commits[-1])[0]
            raise CheckpointError(
                f"`{self.run_dir}` has {len(commits)} checkpoints and none is intact; {commits[-1].name}: {problem}"
            )
        return None

    # --------------------------------------------------------------- starting

    def recover(self) -> list[str]:
        """Finishes or deletes what a killed job left behind; returns one line for everything it did or found.

        Afterwards there is no staging and no trash, and the pointer names the newest commit that verifies.
        """
        done: list[str] = []
        if not self.folder.is_dir():
            return done
        with disk_errors(self.folder):
            for path in sorted(self.folder.iterdir()):
                if path.name.startswith("staging-"):
                    done.append(self._finish(path))
                elif path.name.startswith("trash-") and os.path.lexists(path):  # it may be gone with its commit
                    self._delete(path)
                    done.append(f"deleted {path.name}")
            for path in reversed(self.commits()):
                if self._good(path):
                    if self.pointer() != path.name:
                        self._point(path)
                        done.append(f"latest now names {path.name}")
                    break
                done.append(f"{path.name} is damaged and not used: {verify(path)[0]}")
        return done

    def pointer(self) -> str | None:
        """What RUN/latest names; None where there is no such file."""
        try:
            with open_plain(self.run_dir / "latest") as file:
                return file.read(200).decode(errors="replace").strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"`{self.run_dir / 'latest'}` cannot be read: {error.strerror}") from None

    def lock(self) -> None:
        """Takes the run directory for this process until `unlock` or its death.

        Raises:
            CheckpointError: another living process holds it.
        """
        with disk_errors(self.run_dir):
            self._mkdir(self.run_dir)
            self._hook("create", self.run_dir / "lock")
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.fdopen(os.open(self.run_dir / "lock", flags, 0o666), "r+", encoding="utf-8", errors="replace")
        take(file, self.run_dir)
        with disk_errors(self.run_dir / "lock"):
            self._hook("write", self.run_dir / "lock")
            file.seek(0)
            file.truncate()
            file.write(f"{myself()}\n")
            file.flush()
        self._lock = file

    def unlock(self) -> None:
        """Gives the run directory back."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.truncate(0)  # where there are no locks, the next one reads it
            self._lock.close()
            self._lock = None

    # ------------------------------------------------------- steps of the above

    def _finish(self, staging: Path) -> str:
        """A staging directory with an intact manifest was committed in all but name; anything else was not."""
        step = number(staging.name)
        if step is not None and _is_directory(staging) and not verify(staging):
            self._publish(staging, step)
            return f"finished the commit of step {step}"
        self._discard(staging)
        return f"deleted {staging.name}, which was not complete"

    def _target(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _renamed(self, step: int, sealed: bytes) -> bool:
        """Whether the commit with this very manifest has its name already."""
        with contextlib.suppress(FileNotFoundError), open_plain(self._target(step) / MANIFEST) as file:
            return file.read(len(sealed) + 1) == sealed
        return False

    def _publish(self, staging: Path, step: int) -> Path:
        target = self._target(step)
        if os.path.lexists(staging):  # it is gone where a full disk stopped an earlier call behind the rename
            if os.path.lexists(target):  # the same step again, after resuming from an older or damaged commit
                self._trash(target)
            self._rename(staging, target)
        self._sync(self.folder)
        self._verified[target.name] = _signature(target)
        self._point(target)
        for path in self.folder.glob(f"trash-{target.name}*"):
            self._delete(path)
        return target

    def _point(self, target: Path) -> None:
        self._write(self.run_dir / "latest.new", f"{target.name}\n".encode())
        self._hook("replace", self.run_dir / "latest")
        (self.run_dir / "latest.new").replace(self.run_dir / "latest")
        self._sync(self.run_dir)

    def _good(self, path: Path) -> bool:
        """Verifies a commit once, and again when one of its files has changed since."""
        if not _is_directory(path):
            return False
        signature = _signature(path)
        if self._verified.get(path.name) != signature:
            self._verified.pop(path.name, None)
            if not verify(path):
                self._verified[path.name] = signature
        return path.name in self._verified

    def _discard(self, path: Path) -> None:
        self._delete(self._trash(path))

    def _trash(self, path: Path) -> Path:
        names = (self.folder / f"trash-{path.name}-{count}" for count in itertools.count())
        trash = next(name for name in names if not os.path.lexists(name))
        self._rename(path, trash)
        self._verified.pop(path.name, None)
        return trash

    def _delete(self, trash: Path) -> None:
        if not _is_directory(trash):
            self._hook("unlink", trash)
            trash.unlink()
            return
        for path in sorted(trash.iterdir()):
            self._delete(path)
        self._hook("rmdir", trash)
        try:
            trash.rmdir()
        except OSError as error:
            # NFS keeps a deleted file under another name while someone has it open: the next start deletes the rest.
            if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                raise

    def _seal(self, path: Path) -> Described:
        self._hook("fsync", path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            return describe(file)

    def _write(self, path: Path, content: bytes) -> None:
        self._hook("create", path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
            for part in (content[: len(content) // 2], content[len(content) // 2 :]):
                self._hook("write", path)
                file.write(part)
                file.flush()
            self._hook("fsync", path)
            os.fsync(file.fileno())

    def _mkdir(self, path: Path) -> None:
        if not path.is_dir():
            self._hook("mkdir", path)
            path.mkdir(parents=True, exist_ok=True)
            self._sync(path.parent)

    def _rename(self, source: Path, target: Path) -> None:
        self._hook("rename", target)
        source.rename(target)

    def _sync(self, folder: Path) -> None:
        self._hook("fsync", folder)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the OSError of a full or over-quota disk into DiskFullError, of a read-only one into DiskError and any
    other into CheckpointError."""
    try:
        yield
    except OSError as error:
        kind: type[ParlanceError] = DiskError if error.errno in DISK_ERRNOS else CheckpointError
        if error.errno in FULL_ERRNOS:
            kind = DiskFullError
        raise kind(f"`{error.filename or path}` cannot be written: {error.strerror or error}") from error


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _signature(path: Path) -> Signature:
    found = [(one.name, one.lstat()) for one in sorted(path.iterdir())]
    return [(name, status.st_size, status.st_mtime_ns, status.st_ino) for name, status in found]

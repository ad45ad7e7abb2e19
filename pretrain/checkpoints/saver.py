"""A save in three parts: copy the state, write it while training goes on, commit it when every rank has written.

    start    training stands still: each rank copies its share into memory that it keeps for this
    ...      a thread writes, fsyncs and hashes the files of its rank in staging; training goes on
    finish   training stands still: rank 0 renames and moves the pointer, then deletes old commits

Until `finish` the save does not exist, and a kill costs the updates since the commit before. What belongs to the step
(generators, progress) is taken at `start`.

The writer is a thread and no process. It spends its time in system calls, in safetensors and in sha256, which all
release the interpreter's lock: measured, 400 MB were saved, synced and hashed beside a thread that woke every
millisecond and was never kept waiting for more than 30. And it ends with its rank: a process would outlive a kill -9
of its rank, and write into a directory that the next life has already taken over. It also needs no second copy of
torch, and its memory may be pinned.
"""

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain import distributed, rng
from pretrain.checkpoints.checkpoint import FORMAT, PROGRESS
from pretrain.checkpoints.commit import Store, disk_errors
from pretrain.checkpoints.patience import Patience
from pretrain.checkpoints.seal import Described
from pretrain.distributed import World
from pretrain.engine import Engine, state
from pretrain.errors import ParlanceError
from pretrain.watchdog import sign_of_life

SLOW_DISK = 600.0  # seconds that training waits for writers that seem to do nothing
Spare = Callable[[Store], Collection[str]]


@dataclass(frozen=True)
class Saved:
    """A save that is committed.

    seconds: that training stood still for it, `paused_seconds` of them for want of room on the disk. write_seconds: of
    this rank's writer.
    """

    step: int
    path: Path
    seconds: float
    write_seconds: float
    paused_seconds: float


@dataclass
class _Started:
    """A save that is copied.

    files: what this rank has sealed, None until its writer is done. error: what the writer ended in instead. paused:
    what patience had spent before this save.
    """

    step: int
    staging: Path
    copied: state.Copy
    generators: rng.Generators
    progress: str
    paused: float
    seconds: float = 0.0
    writer: threading.Thread | None = None
    files: dict[str, Described] | None = None
    error: BaseException | None = None
    write_seconds: float = 0.0


class Saver:
    """Saves of one engine into one store, one at a time; every rank has one.

    Args:
        keep: newest commits to keep (0: all). spare: names those that are kept besides, called on rank 0.
        patience: what a full disk is met with.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        world: World,
        keep: int = 0,
        spare: Spare = lambda store: (),
        patience: Patience | None = None,
    ) -> None:
        self.store, self.engine, self.world, self.keep, self.spare = store, engine, world, keep, spare
        self.patience = patience or Patience()
        self._memory: dict[str, Tensor] = {}
        self._started: _Started | None = None

    @property
    def writing(self) -> bool:
        """Whether this rank is not done with a save; where no rank says so, `finish` waits for nobody."""
        return self._started is not None and self._started.writer is not None and self._started.writer.is_alive()

    def start(self, step: int, progress: dict[str, Any]) -> None:
        """Copies the state after `step` updates and begins to write it. Collective; `finish` the last save before.

        Args:
            progress: what the loop needs to go on, as JSON.

        Raises:
            NonFiniteError: a weight or optimizer state is not finite; nothing is written.
            DiskError: the disk is full, over quota or read-only. Requeue: a signal came while it was full.
        """
        if self._started is not None:
            raise RuntimeError(f"the save of step {self._started.step} must be finished before that of step {step}")
        began, paused = time.perf_counter(), self.patience.paused
        ranks = {"ranks": self.world.size, "tensor_parallel": self.world.tensor_parallel}
        content = {"format": FORMAT, "step": step, **ranks, "progress": progress}
        text = json.dumps(content, indent=1, allow_nan=False)
        copied, generators = state.copy(self.engine, self._memory), rng.capture()
        staging = Path(self._on_rank_zero(lambda: str(self.store.begin(step))))
        self._started = _Started(step, staging, copied, generators, text, paused)
        self._begin_to_write(self._started)
        self._started.seconds = time.perf_counter() - began

    def finish(self) -> Saved | None:
        """Waits for the writers of all ranks, commits what `start` copied and applies retention; None without a save.

        Collective.

        Raises:
            DiskError: the disk is full, over quota or read-only; earlier commits are intact. Requeue: as in `start`.
            CheckpointError: the disk failed otherwise, or rank 0 does not see a file that another rank wrote.
        """
        save, began = self._started, time.perf_counter()
        if save is None:
            return None
        try:
            files = self.patience(lambda: self._written(save))
            path = Path(self._on_rank_zero(lambda: str(self.store.commit(save.staging, save.step, files))))
        except ParlanceError:
            distributed.rank_zero(lambda: self.store.discard(save.staging))
            raise
        finally:
            self._started = None
        if self.keep:
            self._on_rank_zero(lambda: self.store.retain(self.keep, self.spare(self.store)), long=True)
        paused = self.patience.paused - save.paused
        return Saved(save.step, path, save.seconds + time.perf_counter() - began, save.write_seconds, paused)

    def _on_rank_zero(self, action: Callable[[], Any], long: bool = False) -> Any:
        return self.patience(lambda: distributed.rank_zero(action, long))

    def _written(self, save: _Started) -> dict[str, Described]:
        """What all ranks have sealed; collective. After an error it may be called again: who failed writes again."""
        if save.writer is None:
            self._begin_to_write(save)
        assert save.writer is not None
        began = time.monotonic()

        def waits_on_purpose() -> None:  # who waits for a file system that is a program looks idle
            if time.monotonic() - began < SLOW_DISK:
                sign_of_life()

        distributed.await_all(save.writer, waits_on_purpose)
        error, save.error = save.error, None
        if error is not None:
            save.writer = None
        if error is not None and not isinstance(error, ParlanceError):  # not foreseen: it keeps its traceback
            raise error
        distributed.agree(error)
        return {name: described for part in distributed.exchange(save.files) for name, described in part.items()}

    def _begin_to_write(self, save: _Started) -> None:
        # A daemon: a rank that fails elsewhere must end at once, and what it leaves in staging is no commit.
        save.writer = threading.Thread(target=self._write, args=(save,), name="checkpoint", daemon=True)
        save.writer.start()

    def _write(self, save: _Started) -> None:
        began, rank = time.perf_counter(), self.world.rank
        generators = f"rng-rank{rank}.safetensors"
        names = [*save.copied.files, generators, *([] if rank else [PROGRESS])]
        try:
            with disk_errors(save.staging):
                _check_room(save)
                state.write(save.copied, save.staging)
                with state.os_errors(save.staging / generators):
                    save.generators.write(save.staging / generators)
                if rank == 0:
                    (save.staging / PROGRESS).write_text(save.progress, encoding="utf-8")
            save.files = self.store.seal(save.staging, names)
        except BaseException as error:  # raised where the save is finished
            save.error = error
            for name in names:  # half a file must not keep the disk full for everybody else
                with contextlib.suppress(OSError):
                    (save.staging / name).unlink()
        finally:
            save.write_seconds += time.perf_counter() - began


def _check_room(save: _Started) -> None:
    """Raises OSError where the file system says that it cannot hold this rank's share: not to fill it for everybody."""
    found = os.statvfs(save.staging)
    needed = sum(tensor.nbytes for tensor in save.copied.tensors.values())
    if found.f_blocks and found.f_bfree * found.f_frsize < needed:  # without blocks it does not say
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(save.staging / save.copied.files[0]))

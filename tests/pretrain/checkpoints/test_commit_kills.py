"""The commit layer alone, killed and refused by the disk at every file operation: never stuck, never a lost commit."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import rng
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.seal import verify
from pretrain.distributed import World
from pretrain.engine import state
from pretrain.errors import CheckpointError, DiskError
from tests.pretrain.checkpoints.commits import Killed, Script, life, operations, prepare, save, step_of, tidy
from tests.pretrain.toy_engine import toy_engine, toy_train


def test_kill_at_every_operation(tmp_path: Path) -> None:
    total = operations(tmp_path / "count")
    assert total > 70
    reached = set()
    for at in range(1, total + 1):
        run = tmp_path / str(at)
        prepare(run)
        committed = 2
        store = Store(run, Script(at, Killed()))
        try:
            life(store)
        except Killed:
            pass
        else:
            raise AssertionError("the kill never happened")
        done = [p for p in store.commits() if not verify(p)]
        assert done, "no intact commit on the disk after the kill"
        committed = max([committed, *(int(p.name[5:]) for p in done)])
        after = Store(run)
        after.recover()
        latest = after.latest()
        assert latest is not None and step_of(latest) >= committed, f"operation {at}: lost commit {committed}"
        assert after.pointer() == latest.name and tidy(run)
        assert all(not verify(p) for p in after.commits())
        reached.add(latest.name)
        save(after, 5)  # never stuck
        assert step_of(Store(run).latest()) == 5
    assert reached == {"step-00000002", "step-00000003", "step-00000004"}


@pytest.mark.fault("kill -9 at a file operation of a save, retention or recovery", trials=24)
def test_real_kills(tmp_path: Path) -> None:
    """The same by SIGKILL, of a process of its own, at every third operation."""
    points = range(1, operations(tmp_path / "count") + 1, 3)
    assert len(points) >= 24
    for at in points:
        run = tmp_path / str(at)
        prepare(run)
        kill(lambda run=run, at=at: life(Store(run, Suicide(at, Killed()))))  # type: ignore[misc]
        after = Store(run)
        after.lock()
        after.recover()
        assert step_of(after.latest()) >= 2 and tidy(run)
        save(after, 6)
        assert step_of(Store(run).latest()) == 6


def kill(life: Callable[[], object]) -> None:
    """Runs `life` in a process of its own, which must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            life()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


class Suicide(Script):
    """SIGKILL instead of an exception."""

    def __call__(self, operation: str, path: Path) -> None:
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


OBSERVED = """
import sys
from pathlib import Path
from pretrain.checkpoints.commit import Store
from tests.pretrain.checkpoints.commits import content, life, prepare

run, told = Path(sys.argv[1]), [0]
ours = content(1)  # the files of the ranks, which are written and sealed as a whole
prepare(run)
seen = unseen = 0


def observe(event, arguments):
    global seen, unseen
    changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
    named = event == "open" and not isinstance(arguments[0], int)  # a descriptor is opened after its file
    opens = named and arguments[2] & 3 and Path(arguments[0]).name not in ours
    if (changes or opens) and str(arguments[0]).startswith(str(run)):
        seen += 1
        unseen += told[0] == 0
        told[0] = 0


def tell(operation, path):
    told[0] = 1


sys.addaudithook(observe)
life(Store(run, tell))
print(seen, unseen)
"""


def test_no_operation_goes_without_its_hook(tmp_path: Path) -> None:
    """Python itself tells of every file that is opened to write, made, renamed or deleted."""
    done = subprocess.run([sys.executable, "-c", OBSERVED, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen, unseen = map(int, done.stdout.split())
    assert seen > 30 and unseen == 0


def test_kill_during_recovery(tmp_path: Path) -> None:
    """A second kill inside the recovery of a first, at every operation of it."""
    total = operations(tmp_path / "count")
    for at in range(1, total + 1, 3):
        again = 1
        while True:
            run = tmp_path / f"{at}-{again}"
            prepare(run)
            with pytest.raises(Killed):
                life(Store(run, Script(at, Killed())))
            try:
                Store(run, Script(again, Killed())).recover()
                break
            except Killed:
                after = Store(run)
                after.recover()
                assert step_of(after.latest()) >= 2 and tidy(run)
                again += 1


SEEN = 100  # file operations of the life below, at least
ALONE = World(0, 1, 0, torch.device("cpu"))


def background_life(run: Path, hook: Script, keep: int) -> None:
    """Saves that a thread writes while training goes on, each rank's files in three operations of their own."""

    def torn(tensors: Any, path: Path, metadata: Any = None) -> None:
        hook("create", path)
        real(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        hook("write", path)
        path.write_bytes(whole)
        hook("write", path)

    real, state.save_file, rng.save_file = state.save_file, torn, torn  # type: ignore[assignment]
    rng.seed(5)
    engine = toy_engine(ALONE, "local", dropout=0.3)
    store = Store(run, hook)
    store.lock()
    store.recover()
    saver = Saver(store, engine, ALONE, keep)
    for step in range(4):
        saver.start(step, {"position": step})
        toy_train(engine, range(step, step + 1))
        saver.finish()
    os._exit(0)


def background_kills(folder: Path, points: Callable[[int], range]) -> int:
    """Kills that life at some of its operations, by SIGKILL; returns how often."""
    whole, counted = folder / "whole", folder / "count"

    class Counting(Script):
        def __call__(self, operation: str, path: Path) -> None:
            super().__call__(operation, path)
            counted.write_text(str(self.seen))

    for run, keep in ((whole, 0), (folder / "kept", 2)):
        child = os.fork()
        if child == 0:
            background_life(run, Counting(0, Killed()), keep)
        assert os.waitpid(child, 0)[1] == 0
    wanted = {path.name: {file.name: file.read_bytes() for file in path.iterdir()} for path in Store(whole).commits()}
    assert list(wanted) == [f"step-{step:08d}" for step in range(4)] and len(set(map(str, wanted.values()))) == 4
    total = int(counted.read_text())
    assert total >= SEEN
    for at in points(total):
        run = folder / str(at)
        kill(lambda run=run, at=at: background_life(run, Suicide(at, Killed()), 2))  # type: ignore[misc]
        before = [path.name for path in Store(run).commits() if not verify(path)]
        after = Store(run)
        after.lock()
        after.recover()
        found = {path.name: {file.name: file.read_bytes() for file in path.iterdir()} for path in after.commits()}
        assert found == {name: wanted[name] for name in found}, f"operation {at}: not a bit of another step"
        assert max(found, default="") >= max(before, default="") and (not found or tidy(run))
        save(after, 5)
        assert step_of(Store(run).latest()) == 5
    return len(points(total))


@pytest.mark.fault("kill -9 at a file operation of a save, retention or recovery", trials=20)
def test_kills_of_a_background_save(tmp_path: Path) -> None:
    assert background_kills(tmp_path, lambda total: range(1, total + 1, 5)) >= 20


@pytest.mark.slow
@pytest.mark.fault("kill -9 at a file operation of a save, retention or recovery", trials=SEEN)
def test_kills_of_a_background_save_at_every_operation(tmp_path: Path) -> None:
    assert background_kills(tmp_path, lambda total: range(1, total + 1)) >= SEEN


@pytest.mark.fault("disk full, over quota, read-only, EIO", trials=35)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_at_every_operation(tmp_path: Path, code: int) -> None:
    total = operations(tmp_path / "count")
    assert total >= 70
    for at in range(1, total + 1, 2):
        run = tmp_path / str(at)
        prepare(run)
        script = Script(at, OSError(code, os.strerror(code), str(run)))
        try:
            life(Store(run, script))
        except (DiskError, CheckpointError) as error:
            assert str(run) in str(error) and isinstance(error, CheckpointError) == (code == errno.EIO)
        else:
            assert total - 2 <= at <= script.seen, "only giving up a save may go wrong in silence"
        after = Store(run)
        after.recover()
        assert step_of(after.latest()) >= 2

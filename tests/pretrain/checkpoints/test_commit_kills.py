"""The commit layer alone, killed and refused by the disk at every file operation: never stuck, never a lost commit."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.seal import verify
from pretrain.errors import DiskError
from tests.pretrain.checkpoints.commits import Killed, Script, life, operations, prepare, save, step_of, tidy


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


def test_real_kills(tmp_path: Path) -> None:
    """The same by SIGKILL, of a process of its own, at every third operation."""
    for at in range(1, operations(tmp_path / "count") + 1, 3):
        run = tmp_path / str(at)
        prepare(run)
        child = os.fork()
        if child == 0:
            try:
                life(Store(run, Suicide(at, Killed())))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        after = Store(run)
        after.lock()
        after.recover()
        assert step_of(after.latest()) >= 2 and tidy(run)
        save(after, 6)
        assert step_of(Store(run).latest()) == 6


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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_disk_full_at_every_operation(tmp_path: Path, code: int) -> None:
    total = operations(tmp_path / "count")
    for at in range(1, total + 1, 2):
        run = tmp_path / str(at)
        prepare(run)
        script = Script(at, OSError(code, os.strerror(code), str(run)))
        try:
            life(Store(run, script))
        except DiskError as error:
            assert str(run) in str(error)
        else:
            assert total - 2 <= at <= script.seen, "only giving up a save may go wrong in silence"
        after = Store(run)
        after.recover()
        assert step_of(after.latest()) >= 2

"""The commit protocol: killed at every file operation, filled disks, flipped bits, two jobs at once."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain.commit import Store
from pretrain.errors import CheckpointError, DiskError
from pretrain.seal import verify


class Killed(BaseException):
    """As SIGKILL: nothing handles it."""


class Script:
    """A hook that does something at the n-th operation."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.seen = at, error, 0

    def __call__(self, operation: str, path: Path) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise self.error


def content(step: int) -> dict[str, bytes]:
    return {"state-rank0.safetensors": bytes([step % 251]) * (100 + step), "progress.json": b'{"step": %d}' % step}


def save(store: Store, step: int) -> None:
    staging = store.begin(step)
    for name, data in content(step).items():
        (staging / name).write_bytes(data)
    store.commit(staging, step)


def step_of(path: Path | None) -> int:
    assert path is not None
    step = int(path.name.removeprefix("step-"))
    assert {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"} == content(step)
    return step


def life(store: Store) -> None:
    """Everything a run does to the disk between two crashes."""
    store.recover()
    save(store, 3)
    store.retain(2)
    save(store, 4)
    store.retain(2)
    save(store, 4)  # the same step again


def operations(tmp_path: Path) -> int:
    count = Script(0, Killed())
    prepare(tmp_path)
    life(Store(tmp_path, count))
    return count.seen


def prepare(run: Path) -> None:
    store = Store(run)
    for step in (1, 2):
        save(store, step)


def tidy(run: Path) -> bool:
    names = [p.name for p in (run / "checkpoints").iterdir()]
    return all(name.startswith("step-") for name in names)


def test_kill_at_every_operation(tmp_path: Path) -> None:
    total = operations(tmp_path / "count")
    assert total > 60
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
        with pytest.raises(DiskError, match=str(run)):
            life(Store(run, Script(at, OSError(code, os.strerror(code), str(run)))))
        after = Store(run)
        after.recover()
        assert step_of(after.latest()) >= 2


def test_other_errors_are_checkpoint_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Permission"):
        save(Store(tmp_path, Script(3, PermissionError(errno.EACCES, "Permission denied", "x"))), 1)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    prepare(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000002"
    rng = np.random.default_rng(0)
    files = sorted(newest.iterdir())
    for _ in range(1000):
        path = files[rng.integers(len(files))]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        assert verify(newest), f"{path.name} was changed unseen"
        path.write_bytes(good)
    path.write_bytes(bad)
    store = Store(tmp_path)
    assert any("damaged and not used" in line for line in store.recover())
    assert step_of(store.latest()) == 1 and store.pointer() == "step-00000001"
    save(store, 2)
    assert step_of(store.latest()) == 2


def test_missing_and_unexpected_files(tmp_path: Path) -> None:
    prepare(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000002"
    (newest / "extra").write_bytes(b"")
    (newest / "progress.json").unlink()
    assert verify(newest) == ["extra is not in the manifest", "progress.json cannot be read: No such file or directory"]


def test_nothing_intact_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    assert Store(tmp_path).latest() is None
    prepare(tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "progress.json").write_bytes(b"x")
    store = Store(tmp_path)
    store.recover()
    with pytest.raises(CheckpointError, match=r"2 checkpoints and none is intact; step-00000002: progress.json"):
        store.latest()


def test_retention_keeps_the_last_one_that_verifies(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in range(1, 6):
        save(store, step)
    for step in (4, 5):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "progress.json").write_bytes(b"x")
    assert Store(tmp_path).retain(2) == ["step-00000001", "step-00000002"]
    assert step_of(Store(tmp_path).latest()) == 3
    assert tidy(tmp_path)


def test_only_plain_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    staging = store.begin(1)
    (staging / "inner").mkdir()
    with pytest.raises(CheckpointError, match="inner"):
        store.commit(staging, 1)
    assert store.latest() is None
    assert not list(store.begin(1).iterdir())


HOLD = """
import sys, time
from pretrain.commit import Store
store = Store(sys.argv[1])
store.lock()
print("held", flush=True)
time.sleep(60)
"""


def test_two_jobs_and_a_stale_lock(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"one job at a time, is in use by host \S+ pid {other.pid}"):
            Store(tmp_path).lock()
    finally:
        other.kill()
        other.wait()
    store = Store(tmp_path)
    store.lock()
    store.unlock()

"""The commit protocol: flipped bits, missing files, links, retention, two jobs at once."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.seal import verify
from pretrain.errors import CheckpointError
from tests.pretrain.checkpoints.commits import Script, content, prepare, save, step_of, tidy


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
    assert Store(tmp_path).retain(2) == ["step-00000001"]
    assert step_of(Store(tmp_path).latest()) == 3
    assert tidy(tmp_path)


def test_retention_notices_what_was_damaged_after_it_was_verified(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in range(1, 5):
        save(store, step)
    for step in (3, 4):
        path = tmp_path / "checkpoints" / f"step-{step:08d}" / "progress.json"
        path.write_bytes(b"X" * path.stat().st_size)
    assert store.retain(1) == ["step-00000001"]
    assert step_of(store.latest()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda staging: (staging / "inner").mkdir(), r"inner` must be a plain file"),
        (lambda staging: (staging / "link").symlink_to("/etc/passwd"), r"link` must be a plain file"),
        (lambda staging: (staging / "extra").touch(), r"extra` must not be there: no rank wrote it"),
        (lambda staging: (staging / "progress.json").unlink(), r"progress.json` must be there: a rank wrote it"),
        (lambda staging: (staging / "progress.json").write_bytes(b"x"), r"must have the 11 bytes .* it has 1"),
    ],
)
def test_exactly_what_was_sealed_is_committed(change: Any, message: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    staging = store.begin(1)
    for name, data in content(1).items():
        (staging / name).write_bytes(data)
    sealed = store.seal(staging, content(1))
    change(staging)
    with pytest.raises(CheckpointError, match=message):
        store.commit(staging, 1, sealed)
    assert store.latest() is None
    assert not list(store.begin(1).iterdir())


def test_links_are_not_followed(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    prepare(run)
    outside.mkdir()
    (outside / "precious").write_text("kept")
    folder = run / "checkpoints"
    for name in ("step-00000009", "staging-00000009", "trash-step-00000001-0"):
        (folder / name).symlink_to(outside)
    (folder / "staging-00000008").symlink_to(tmp_path / "nowhere")
    (folder / "staging-00000007").touch()
    os.mkfifo(folder / "trash-x")
    (folder / "step-00000002" / "progress.json").unlink()
    (folder / "step-00000002" / "progress.json").symlink_to(outside / "precious")
    store = Store(run)
    store.recover()
    assert step_of(store.latest()) == 1
    save(store, 9)
    store.retain(1)
    assert [path.name for path in folder.iterdir()] == ["step-00000009"] and step_of(Store(run).latest()) == 9
    for name in ("latest.new", "lock"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / "precious")
    with pytest.raises(CheckpointError, match=r"latest.new` cannot be written"):
        save(store, 10)
    with pytest.raises(CheckpointError, match=r"lock` cannot be written"):
        store.lock()
    assert [path.name for path in outside.iterdir()] == ["precious"] and (outside / "precious").read_text() == "kept"


HOLD = """
import sys, time
from pretrain.checkpoints.commit import Store
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


def test_what_nfs_keeps_of_an_open_file_is_deleted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS renames a file that is deleted while someone reads it, so the folder is not empty for a while."""
    real = Path.unlink

    def silly(self: Path, missing_ok: bool = False) -> None:
        self.rename(self.with_name(f".nfs{self.name}"))

    store = Store(tmp_path)
    save(store, 1)
    save(store, 2)
    monkeypatch.setattr(Path, "unlink", silly)
    store.retain(1)
    assert store.latest() == tmp_path / "checkpoints" / "step-00000002"
    monkeypatch.setattr(Path, "unlink", real)
    store.recover()
    assert tidy(tmp_path)


def test_a_damaged_commit_takes_no_intact_ones_place(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (1, 2, 3):
        save(store, step)
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").write_bytes(b"{}")
    again = Store(tmp_path)
    assert again.retain(2) == [] and [path.name[-1] for path in again.commits()] == ["1", "2", "3"]
    save(again, 4)
    assert again.retain(2) == ["step-00000001", "step-00000002"]

"""Disks that refuse, for real: full while saving and while logging, over quota, read-only, and a damaged checkpoint.

Every case ends in one line and exit code 6 on both ranks; what was committed stays; and once there is space again the
same command goes on to the bits of a run that was never disturbed.
"""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from pretrain import runs
from pretrain.engine import state
from pretrain.runs import read_events
from tests.e2e.lives import Forked, a_second_later, final_files, newest
from tests.pretrain.runs import make_data, training_curve, write_config

EVERY = ("train.validate_every=2", "train.sample_every=2", "train.save_every=2", "train.keep=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"), 150)


@pytest.fixture(scope="module")
def calm(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight updates that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    live(folder, data, 8)
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def half(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has done four of its eight updates."""
    folder = tmp_path_factory.mktemp("half")
    live(folder, data, 4)
    return folder / "runs"


@pytest.fixture
def four(half: Path, tmp_path: Path) -> Path:
    """The folder of a copy of it."""
    shutil.copytree(half, tmp_path / "runs")
    return tmp_path


def live(folder: Path, data: Path, steps: int, *more: str, before: Callable[[], None] | None = None) -> str:
    """One life of the run in `folder`; returns its one-line error, "" if it came to its end."""
    a_second_later(folder / "runs" / "tiny")
    log = folder / f"{len(list(folder.glob('*.log')))}.log"
    config = write_config(folder, data)
    life = Forked(log, "train", config, f"train.steps={steps}", *EVERY, *more, before=before)
    codes, printed = life.wait(), life.printed()
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed, printed
    assert codes == ([6, 6] if errors else [0, 0]) and len(errors) == bool(errors), printed
    return errors[0] if errors else ""


def goes_on(folder: Path, data: Path, calm: Path) -> None:
    """Nothing is lost, and the same command now ends where it would have ended."""
    run = folder / "runs" / "tiny"
    assert newest(run) >= 4
    assert live(folder, data, 8) == ""
    assert final_files(run, 8) == final_files(calm, 8)
    assert training_curve(run) == training_curve(calm)
    assert read_events(run)[-1]["event"] == "finish"


def files_of_at_most(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_full_while_saving(four: Path, data: Path, calm: Path) -> None:
    error = live(four, data, 8, before=partial(files_of_at_most, 60_000))
    assert "state-rank" in error and error.split(" (rank")[0].endswith("cannot be written: File too large")
    run = four / "runs" / "tiny"
    assert newest(run) == 4 and (run / "latest").read_text() == "step-00000004\n"
    assert not list((run / "checkpoints").glob("staging-*")), "what could not be saved does not fill the disk"
    event = read_events(run)[-1]
    assert (event["event"], event["kind"], event["step"]) == ("error", "DiskError", 4)
    goes_on(four, data, calm)


def test_full_while_logging(four: Path, data: Path, calm: Path) -> None:
    run = four / "runs" / "tiny"
    begun = min(path.stat().st_size for path in (run / "tb").iterdir())
    # The board takes its first updates; no checkpoint is due before it takes no more.
    error = live(four, data, 80, "train.save_every=80", before=partial(files_of_at_most, begun + 2_000))
    assert error.endswith("cannot be written: File too large") and "runs/tiny" in error
    assert newest(run) == 4
    goes_on(four, data, calm)


@pytest.mark.slow
def test_full_while_starting(four: Path, data: Path, calm: Path) -> None:
    run = four / "runs" / "tiny"
    error = live(four, data, 8, before=partial(files_of_at_most, 100))
    assert "config.yaml`: File too large; free space and run the command again" in error
    with (run / "events.jsonl").open("a") as file:
        file.write("\n" * 20_000)
    error = live(four, data, 8, before=partial(files_of_at_most, 20_000))
    assert "events.jsonl` cannot be written: File too large" in error
    goes_on(four, data, calm)


def full_for_texts() -> None:
    real = runs.write_atomic

    def refuse(path: Path, content: bytes) -> None:
        if path.name == "step_000006.txt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content)

    runs.write_atomic = refuse  # type: ignore[assignment]


@pytest.mark.slow
def test_full_while_writing_texts(four: Path, data: Path, calm: Path) -> None:
    error = live(four, data, 8, before=full_for_texts)
    assert error.endswith("step_000006.txt` cannot be written: No space left on device")
    assert newest(four / "runs" / "tiny") == 6, "the save that was due at that update was made"
    goes_on(four, data, calm)


def quota_of_rank_1() -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: Quota exceeded (os error {errno.EDQUOT})")

    if os.environ["RANK"] == "1":
        state.save_file = refuse  # type: ignore[assignment]


@pytest.mark.slow
def test_over_quota_on_one_rank(four: Path, data: Path, calm: Path) -> None:
    error = live(four, data, 8, before=quota_of_rank_1)
    assert "state-rank1.safetensors` cannot be written: Disk quota exceeded (rank 1 on " in error
    goes_on(four, data, calm)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Mounts and, in the end, unmounts; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount(target: Path, *options: str) -> None:
        done = subprocess.run(["mount", *options, str(target)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this user may not mount: {done.stderr.strip()}")
        mounted.append(target)

    yield mount
    for target in reversed(mounted):
        subprocess.run(["umount", str(target)], check=True)


@pytest.mark.slow
def test_a_small_disk_that_is_full(data: Path, calm: Path, tmp_path: Path, mount: Callable[..., None]) -> None:
    (tmp_path / "runs").mkdir()
    mount(tmp_path / "runs", "-t", "tmpfs", "-o", "size=2m", "none")
    live(tmp_path, data, 4)
    ballast = tmp_path / "runs" / "ballast"
    free = os.statvfs(tmp_path / "runs")
    ballast.write_bytes(b"x" * (free.f_bavail * free.f_frsize - 100_000))
    assert live(tmp_path, data, 8).split(" (rank")[0].endswith("cannot be written: No space left on device")
    ballast.unlink()
    goes_on(tmp_path, data, calm)


@pytest.mark.slow
def test_a_read_only_run_directory(four: Path, data: Path, calm: Path, mount: Callable[..., None]) -> None:
    runs = four / "runs"
    mount(runs, "--bind", str(runs))
    subprocess.run(["mount", "-o", "remount,ro,bind", str(runs)], check=True)
    assert live(four, data, 8).endswith("cannot be written: Read-only file system")
    subprocess.run(["mount", "-o", "remount,rw,bind", str(runs)], check=True)
    goes_on(four, data, calm)


def test_a_damaged_newest_checkpoint(four: Path, data: Path, calm: Path) -> None:
    run = four / "runs" / "tiny"
    path = run / "checkpoints" / "step-00000004" / "state-rank1.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert newest(run) == 2
    assert live(four, data, 8) == ""
    assert final_files(run, 8) == final_files(calm, 8)
    told = (four / "0.log").read_text()
    assert told.count("step-00000004 is damaged and not used: state-rank1.safetensors: sha256 must be") == 1
    assert "continuing at step 2" in told

"""Disks that refuse, for real: full while saving and while logging, over quota, read-only, and a damaged checkpoint.

Without patience every case ends in one line and exit code 6 on both ranks; what was committed stays; and once there is
space again the same command goes on to the bits of a run that was never disturbed. With patience the same life does.
"""

import errno
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from pretrain import runs
from pretrain.checkpoints import patience
from pretrain.engine import state
from pretrain.report.status import PAUSED, read_status
from pretrain.runs import read_events
from tests.e2e.lives import PATIENCE, Forked, a_second_later, final_files, newest
from tests.pretrain.runs import make_data, training_curve, write_config

EVERY = ("train.validate_every=2", "train.sample_every=2", "train.save_every=2", "train.keep=2")
AT_ONCE, WAITING = "train.disk_patience=0", "train.disk_patience=600"


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
    life = begin(folder, data, steps, AT_ONCE, *more, before=before)
    codes, printed = life.wait(), life.printed()
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed, printed
    code = 5 if errors and "Input/output error" in errors[0] else 6
    assert codes == ([code] * 2 if errors else [0, 0]) and len(errors) == bool(errors), printed
    return errors[0] if errors else ""


def begin(folder: Path, data: Path, steps: int, *more: str, before: Callable[[], None] | None = None) -> Forked:
    a_second_later(folder / "runs" / "tiny")
    log = folder / f"{len(list(folder.glob('*.log')))}.log"
    return Forked(log, "train", write_config(folder, data), f"train.steps={steps}", *EVERY, *more, before=before)


def paused(life: Forked) -> str:
    """The line that says why, as soon as training has paused."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := [line for line in life.printed().splitlines() if line.startswith("paused: ")]:
            return found[0]
        assert life.alive(), life.printed()
        time.sleep(0.05)
    raise AssertionError(life.printed())


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


@pytest.mark.fault("disk full, over quota, read-only, EIO")
def test_full_while_saving(four: Path, data: Path, calm: Path) -> None:
    error = live(four, data, 8, before=partial(files_of_at_most, 100_000))
    assert "state-rank" in error and error.split(" (rank")[0].endswith("cannot be written: File too large")
    run = four / "runs" / "tiny"
    assert newest(run) == 4 and (run / "latest").read_text() == "step-00000004\n"
    assert not list((run / "checkpoints").glob("staging-*")), "what could not be saved does not fill the disk"
    event = read_events(run)[-1]
    assert (event["event"], event["kind"], event["step"]) == ("error", "DiskError", 4)
    goes_on(four, data, calm)


@pytest.mark.fault("disk full, over quota, read-only, EIO")
def test_full_while_logging(four: Path, data: Path, calm: Path) -> None:
    run = four / "runs" / "tiny"
    begun = min(path.stat().st_size for path in (run / "tb").iterdir())
    # The board takes its first updates; no checkpoint is due before it takes no more.
    error = live(four, data, 80, "train.save_every=80", before=partial(files_of_at_most, begun + 2_000))
    assert error.endswith("cannot be written: File too large") and "runs/tiny" in error
    assert newest(run) == 4
    goes_on(four, data, calm)


@pytest.mark.slow
@pytest.mark.fault("disk full, over quota, read-only, EIO", trials=2)
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
@pytest.mark.fault("disk full, over quota, read-only, EIO")
def test_full_while_writing_texts(four: Path, data: Path, calm: Path) -> None:
    error = live(four, data, 8, before=full_for_texts)
    assert error.endswith("step_000006.txt` cannot be written: No space left on device")
    assert newest(four / "runs" / "tiny") == 6, "the save that was due at that update was made"
    goes_on(four, data, calm)


def refused(rank: int, code: int, marker: Path | None = None) -> None:
    """The disk takes no state from a rank, for ever or as long as there is a marker."""
    real = state.save_file

    def refuse(tensors: Any, path: Path) -> None:
        if marker is None or marker.exists():
            path.write_bytes(b"half of a file")
            raise SafetensorError(f"Error while serializing: I/O error: refused (os error {code})")
        real(tensors, path)

    patience.RETRY = 0.1
    if os.environ["RANK"] == str(rank):
        state.save_file = refuse  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.fault("disk full, over quota, read-only, EIO")
@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize(("rank", "code"), [(0, errno.EIO), (1, errno.EDQUOT), (1, errno.EIO)])
def test_refused_on_one_rank(rank: int, code: int, background: str, four: Path, data: Path, calm: Path) -> None:
    error = live(four, data, 8, f"train.async_save={background}", before=partial(refused, rank, code))
    assert f"state-rank{rank}.safetensors` cannot be written: {os.strerror(code)}" in error
    assert ("(rank 1 on " in error) == (rank == 1)
    assert newest(four / "runs" / "tiny") == 4
    goes_on(four, data, calm)


@pytest.mark.fault("disk full, over quota, read-only, EIO")
@pytest.mark.parametrize(
    ("rank", "code", "background"),
    [(1, errno.ENOSPC, "true"), pytest.param(0, errno.EDQUOT, "false", marks=pytest.mark.slow)],
)
def test_pauses_until_there_is_room(rank: int, code: int, background: str, four: Path, data: Path, calm: Path) -> None:
    run, marker = four / "runs" / "tiny", four / "full"
    marker.touch()
    before = partial(refused, rank, code, marker)
    life = begin(four, data, 8, WAITING, f"train.async_save={background}", before=before)
    assert f"state-rank{rank}.safetensors` cannot be written: {os.strerror(code)}" in paused(life)
    assert newest(run) == 4 and read_status(run, time.time()).state == PAUSED
    marker.unlink()
    assert life.wait() == [0, 0], life.printed()
    assert life.printed().count("there is room again") == 1
    assert final_files(run, 8) == final_files(calm, 8) and training_curve(run) == training_curve(calm)
    pause, save = (event for event in read_events(run) if event["event"] == "pause" or "paused_seconds" in event)
    assert os.strerror(code) in pause["message"] and pause["step"] == 4
    assert save["step"] == 6 and 0 < save["paused_seconds"] <= save["save_seconds"]


@pytest.mark.fault("disk full, over quota, read-only, EIO")
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_ends_the_pause(rank: int, four: Path, data: Path, calm: Path) -> None:
    life = begin(four, data, 8, WAITING, before=partial(refused, 1, errno.ENOSPC))
    paused(life)
    os.kill(life.ranks[rank].pid or 0, signal.SIGTERM)
    assert life.wait() == [85, 85], life.printed()
    run = four / "runs" / "tiny"
    assert "error: stopped by a signal while the disk was full (`" in life.printed()
    assert newest(run) == 4 and read_events(run)[-1]["event"] == "stop"
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
@pytest.mark.fault("disk full, over quota, read-only, EIO", trials=3)
def test_a_small_disk_that_is_full(data: Path, calm: Path, tmp_path: Path, mount: Callable[..., None]) -> None:
    (tmp_path / "runs").mkdir()
    mount(tmp_path / "runs", "-t", "tmpfs", "-o", "size=2m", "none")
    live(tmp_path, data, 4)
    ballast = tmp_path / "runs" / "ballast"

    def fill() -> None:
        """Leaves room for the board of a life, not for a checkpoint."""
        ballast.unlink(missing_ok=True)
        free = os.statvfs(tmp_path / "runs")
        ballast.write_bytes(b"x" * (free.f_bavail * free.f_frsize - 150_000))

    fill()
    assert live(tmp_path, data, 8).split(" (rank")[0].endswith("cannot be written: No space left on device")
    fill()
    life = begin(tmp_path, data, 8, "train.disk_patience=1")  # seconds: it gives up in the end
    assert "No space left on device" in paused(life)
    assert life.wait() == [6, 6] and life.printed().count("\nerror: ") == 1, life.printed()
    fill()
    life = begin(tmp_path, data, 8, WAITING)
    assert "No space left on device" in paused(life)
    ballast.unlink()
    assert life.wait() == [0, 0], life.printed()
    goes_on(tmp_path, data, calm)


@pytest.mark.slow
@pytest.mark.fault("disk full, over quota, read-only, EIO")
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

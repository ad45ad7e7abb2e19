"""Pipes, devices and folders in the place of a file: every command ends at once, in one line that names the file."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.__main__ import main
from pretrain.plain import check_plain, open_plain, read_plain
from tests.pretrain.runs import make_data, write_config

SECONDS = 60


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS: list[Callable[[Path], None]] = [pipe, device, Path.mkdir]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("honest")
    assert main(["train", str(write_config(place, make_data(place, 60))), "train.steps=2"]) == 0
    assert main(["handoff", str(place / "runs" / "tiny"), "--out", str(place / "bundle")]) == 0
    return place


@pytest.fixture
def place(honest: Path, tmp_path: Path) -> Path:
    shutil.copytree(honest, tmp_path / "place")
    write_config(tmp_path / "place", tmp_path / "place" / "data")
    text = (tmp_path / "place" / "runs" / "tiny" / "config.yaml").read_text()
    (tmp_path / "place" / "runs" / "tiny" / "config.yaml").write_text(text.replace(str(honest), f"{tmp_path}/place"))
    return tmp_path / "place"


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Whoever waits for a pipe is interrupted, so that the test fails instead of the suite."""

    def give_up(*_: object) -> None:
        raise TimeoutError("waited for a pipe or read a device")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(path: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    make(path)


def refused(capsys: pytest.CaptureFixture[str], code: int, name: str, *arguments: object) -> None:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and name in errors[0], errors


@pytest.mark.parametrize("make", KINDS)
def test_only_a_plain_file_is_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    for read in (open_plain, read_plain, check_plain):
        with pytest.raises(OSError, match="x"):
            read(tmp_path / "x")
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_plain(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_plain(tmp_path / "file", 4)
    with pytest.raises(OSError, match="link"):
        open_plain(tmp_path / "link")


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["config.yaml", "events.jsonl", "latest"])
def test_a_run(name: str, make: Callable[[Path], None], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "runs" / "tiny"
    put(run / name, make)
    refused(capsys, 5, name, "status", run)
    refused(capsys, 5, name, "verify", run)
    if name != "latest":  # the checkpoints are read, not the pointer
        refused(capsys, 5, name, "train", place / "tiny.yaml", "train.steps=3")
    if name == "config.yaml":
        refused(capsys, 5, name, "handoff", run, "--out", place / "new")


@pytest.mark.parametrize("make", KINDS)
def test_env_json_and_the_board_of_a_run(
    make: Callable[[Path], None], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "runs" / "tiny"
    put(run / "env.json", make)
    refused(capsys, 5, "env.json", "verify", run)
    make(run / "tb" / "events.out.tfevents.9999999999.host.1.0")
    assert main(["status", str(run)]) == 0, "what is no board is no sign of a life"


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "index.npy", "tokenizer.json", "tiny-000000.tar"])
def test_a_data_folder(
    name: str, make: Callable[[Path], None], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(place / "data" / name, make)
    refused(capsys, 4, name, "verify", place / "data")
    refused(capsys, 4, name, "train", place / "tiny.yaml", "name=other")
    if name == "manifest.json":
        source = ["--source", f"tiny=text:{place / 'a.txt'}", "--train-tokenizer", 300]
        refused(capsys, 4, name, "prepare", "--out", place / "data", *source)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "provenance.json", "golden.safetensors"])
def test_a_bundle(name: str, make: Callable[[Path], None], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(place / "bundle" / name, make)
    refused(capsys, 5, name, "verify", place / "bundle")
    refused(capsys, 5, name, "train", place / "tiny.yaml", "name=other", f"init_from={place / 'bundle'}")


@pytest.mark.parametrize("make", KINDS)
def test_a_configuration(make: Callable[[Path], None], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(place / "tiny.yaml", make)
    refused(capsys, 3, "tiny.yaml", "train", place / "tiny.yaml")

"""Checkpoints that lie, sealed as if they were honest: one line, nothing read or written outside, nothing executed."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.__main__ import main
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.seal import MANIFEST, manifest_bytes, verify
from tests.pretrain.runs import make_data, reseal, write_config

pytestmark = pytest.mark.fault("hostile hostfile, environment, path, YAML, checkpoint or shard")

STATE, RNG = "state-rank0.safetensors", "rng-rank0.safetensors"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    assert main(["train", str(write_config(folder, make_data(folder, 60))), "train.steps=2"]) == 0
    return folder


@pytest.fixture
def commit(honest: Path, tmp_path: Path) -> Path:
    """The one commit of a run of its own, beside a folder that nothing may touch."""
    shutil.copytree(honest / "runs", tmp_path / "runs")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("kept")
    (found,) = Store(tmp_path / "runs" / "tiny").commits()
    return found


def refused(commit: Path, honest: Path, capsys: pytest.CaptureFixture[str]) -> str:
    folder = commit.parents[3]
    capsys.readouterr()
    for arguments in (
        ["train", str(write_config(folder, honest / "data")), "train.steps=3"],
        ["handoff", str(folder / "runs" / "tiny"), "--out", str(folder / "bundle")],
    ):
        code, printed = main(arguments), capsys.readouterr().err
        if arguments[0] == "train":
            error = printed.strip().splitlines()[-1]
            assert code == 5 and error.startswith("error: ") and len(error) < 700, printed
        elif code:  # a hand-off does not read everything
            assert code == 5 and printed.startswith("error: ") and printed.count("\n") == 1, printed
    outside = folder / "outside"
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "kept"
    return error


def name_in_manifest(name: str) -> Callable[[dict[str, Any]], None]:
    def change(files: dict[str, Any]) -> None:
        files[name] = files[STATE]

    return change


def size_in_manifest(size: Any) -> Callable[[dict[str, Any]], None]:
    def change(files: dict[str, Any]) -> None:
        files[STATE]["bytes"] = size

    return change


MANIFESTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "outside": name_in_manifest("../../../../outside/precious"),
    "absolute": name_in_manifest("/etc/passwd"),
    "folder": name_in_manifest("."),
    "line break": name_in_manifest("a\nb"),
    "empty name": name_in_manifest(""),
    "long name": name_in_manifest("x" * 5000),
    "zero": name_in_manifest("a\0b"),
    "huge size": size_in_manifest(10**300),
    "negative size": size_in_manifest(-1),
    "size is text": size_in_manifest("1"),
    "size is true": size_in_manifest(True),
    "size is infinite": size_in_manifest(float("inf")),
    "no description": lambda files: files.update({STATE: None}),
    "more than asked": lambda files: files[STATE].update(run="rm -rf /"),
    "hash is a list": lambda files: files[STATE].update(sha256=["0"] * 100),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_manifest(what: str, commit: Path, honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((commit / MANIFEST).read_text())
    MANIFESTS[what](manifest["files"])
    (commit / MANIFEST).write_bytes(manifest_bytes(manifest["step"], manifest["files"]))
    assert "none is intact; step-00000002: " in refused(commit, honest, capsys)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 9_000_000,
        b'{"files": ' + b'{"a":' * 100_000,
        b"1" * 10_000,
        b'{"files": [], "step": 2}',
        b"\x80\x04.",
        b"",
    ],
    ids=["deep", "deep objects", "long number", "list", "pickle", "empty"],
)
@pytest.mark.parametrize("file", [MANIFEST, "progress.json", "state.json"])
def test_json(file: str, text: bytes, commit: Path, honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (commit / file).write_bytes(text)
    if file != MANIFEST:
        reseal(commit)
    refused(commit, honest, capsys)


def linked(commit: Path, name: str, target: Path | str) -> None:
    (commit / name).unlink()
    (commit / name).symlink_to(target)


NODES: dict[str, Callable[[Path], object]] = {
    "state is a link": lambda commit: linked(commit, STATE, commit.parents[3] / "outside" / "precious"),
    "state is endless": lambda commit: linked(commit, STATE, "/dev/zero"),
    "progress is a link": lambda commit: linked(commit, "progress.json", "/dev/stdin"),
    "manifest is a link": lambda commit: linked(commit, MANIFEST, commit.parents[3] / "outside" / "precious"),
    "manifest is a pipe": lambda commit: ((commit / MANIFEST).unlink(), os.mkfifo(commit / MANIFEST)),
    "state is a pipe": lambda commit: ((commit / STATE).unlink(), os.mkfifo(commit / STATE)),
    "state is a folder": lambda commit: ((commit / STATE).unlink(), (commit / STATE).mkdir()),
    "one file too many": lambda commit: (commit / "weights.pt").write_bytes(b"\x80\x04."),
}


@pytest.mark.parametrize("what", NODES)
def test_files_that_are_none(what: str, commit: Path, honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    NODES[what](commit)
    assert verify(commit)
    assert "none is intact; step-00000002: " in refused(commit, honest, capsys)


def header(text: bytes, length: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return header(json.dumps({"param/model.shared.weight": entry}).encode(), body=b"\0" * 8)


HEADERS = {
    "huge": header(b"{}", length=2**63),
    "beyond the file": header(b"{}", length=10**7),
    "deep": header(b'{"a":' * 50_000),
    "no json": header(b"\x80\x04." * 10),
    "beyond the data": tensor(data_offsets=[0, 2**62]),
    "backwards": tensor(data_offsets=[8, 0]),
    "negative": tensor(data_offsets=[-8, 0]),
    "absurd shape": tensor(shape=[2**40, 2**40]),
    "unknown type": tensor(dtype="OBJ"),
    "empty": b"",
}


@pytest.mark.parametrize("file", [STATE, RNG])
@pytest.mark.parametrize("what", HEADERS)
def test_headers(what: str, file: str, commit: Path, honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (commit / file).write_bytes(HEADERS[what])
    reseal(commit)
    assert "cannot be read: " in refused(commit, honest, capsys)


def weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(commit: Path) -> None:
        tensors = load_file(commit / STATE)
        key = "param/model.shared.weight"
        save_file({**tensors, key: change(tensors[key]).contiguous()}, commit / STATE)

    return apply


def values(file: str, **changes: Any) -> Callable[[Path], None]:
    def apply(commit: Path) -> None:
        content = json.loads((commit / file).read_text())
        for key, value in changes.items():
            (content["progress"] if key in content.get("progress", ()) else content)[key] = value
        (commit / file).write_text(json.dumps(content))

    return apply


def generator(key: str, value: torch.Tensor | None = None, **rest: Any) -> Callable[[Path], None]:
    def apply(commit: Path) -> None:
        tensors = load_file(commit / RNG)
        true = {"numpy": [1, 0, 0.0], "python": [3, None]}
        changed = {**tensors, key: tensors[key] if value is None else value}
        save_file(changed, commit / RNG, metadata={"rest": json.dumps({**true, **rest})})

    return apply


CONTENTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "broadcast": (weight(lambda value: value[:1, :1]), "must be floating point"),
    "integers": (weight(lambda value: value.long()), "must be floating point"),
    "ranks below 0": (values("state.json", ranks=-1), "cannot be read"),
    "ranks beyond count": (values("state.json", ranks=10**9), "state-rank1.safetensors"),
    "ranks in text": (values("state.json", ranks="1"), "cannot be read"),
    "updates beyond count": (values("state.json", updates=10**400), "cannot be read"),
    "no shapes": (values("state.json", parameters=[1]), "cannot be read"),
    "position beyond count": (values("progress.json", position=10**30), "`position` must be an integer"),
    "step in text": (values("progress.json", step="2"), "`step` must be"),
    "step below 0": (values("progress.json", step=-5), "`step` must be an integer"),
    "other format": (values("progress.json", format="../../x"), "`format` must be 1"),
    "numpy beyond its words": (generator("numpy", numpy=[10**6, 0, 0.0]), "numpy's generator must have 624 words"),
    "numpy before its words": (generator("numpy", numpy=[-1, 0, 0.0]), "numpy's generator must have 624 words"),
    "few words": (generator("numpy", torch.zeros(3, dtype=torch.int64)), "numpy's generator must have 624 words"),
    "short torch": (generator("torch", torch.zeros(3, dtype=torch.uint8)), "cannot be read"),
    "torch of zeros": (generator("torch", torch.zeros(5056, dtype=torch.uint8)), "cannot be read"),
    "long python": (generator("python", torch.full((700,), 2**40)), "cannot be read"),
    "python of nothing": (generator("python", python=[3, {}]), ""),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_contents(what: str, commit: Path, honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = CONTENTS[what]
    change(commit)
    reseal(commit)
    assert message in refused(commit, honest, capsys)

"""Hostile text: bombs, pipes, devices, and pickles where documents are expected. Nothing runs, memory stays bounded."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pretrain.__main__ import main
from pretrain.data.manifest import read_manifest
from tests.e2e.test_hostile import KINDS_OF_PAYLOAD, Calls, ground, hostile, one_line
from tests.pretrain.runs import ROOT

__all__ = ["ground"]  # the fixture that looks for the canary

pytestmark = pytest.mark.fault("hostile hostfile, environment, path, YAML, checkpoint or shard")

KEPT = "One honest document stands here, long enough to be kept."
# Python and the tokenizer take 250 MB; a bomb that is held whole would take half a gigabyte and more.
MOST_MEGABYTES = 600
PREPARE = """
import re, sys
from pathlib import Path
from pretrain.__main__ import main
code = main(["prepare", *sys.argv[1:], "--train-tokenizer", "300", "--workers", "1"])
# Not ru_maxrss: that begins with the size of the process that started this one.
print(code, int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def prepare(source: str) -> int:
    return main(["prepare", "--out", "out", "--source", source, "--train-tokenizer", "300", "--workers", "1"])


def write_bomb(path: Path, head: bytes, filling: bytes, megabytes: int, tail: bytes) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(megabytes):
            file.write(filling * (1 << 20))
        file.write(tail)


def member(name: str, size: int) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = size
    return header.tobuf(tarfile.GNU_FORMAT)


RECORD = json.dumps({"text": KEPT}).encode() + b"\n"
HONEST = member("0.txt", len(KEPT)) + KEPT.encode().ljust(512, b"\0")
# kind: (head, what is repeated, megabytes, tail)
BOMBS = {
    "jsonl": (RECORD + b'{"text": "', b"x", 512, b'"}\n' + RECORD),
    "text": (f"{KEPT}\n\n".encode(), b"\0", 128, f"\n\n{KEPT}\n".encode()),
    "webdataset": (HONEST + member("1.txt", 128 << 20), b"\0", 128, HONEST + bytes(1024)),
    "webdataset, json": (HONEST + member("1.json", 512 << 20), b"[", 512, HONEST + bytes(1024)),
}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.slow if "\0" in str(bomb[1], "ascii") else ())
        for what, bomb in BOMBS.items()
    ],
)
def test_gz_bombs(what: str, ground: Path) -> None:
    """Half a gigabyte, or 128 MB that must be looked at, in a file of a megabyte: what surrounds it is still read."""
    kind = what.partition(",")[0]
    write_bomb(ground / "bomb.gz", *BOMBS[what])
    command = [sys.executable, "-c", PREPARE, "--out", str(ground / "out"), "--source", f"x={kind}:{ground}/bomb.gz"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    code, megabytes = map(int, done.stdout.split())
    assert code == 0 and megabytes < MOST_MEGABYTES, done.stderr[-2000:]
    manifest = read_manifest(ground / "out")
    assert manifest.samples == 2 and manifest.sources[0].skipped


@pytest.mark.parametrize("kind", KINDS_OF_PAYLOAD)
def test_pickles_among_the_members(kind: str, ground: Path) -> None:
    payload = hostile(ground, kind)
    with tarfile.open(ground / "a.tar", "w") as tar:
        for name in (
            "0.txt",
            "a.pkl",
            "a.pickle",
            "a.pyd",
            "a.pth",
            "a.npy",
            "a.cls",
            "../a.pkl",
            "a.json",
            "a.txt.pkl",
        ):
            content = KEPT.encode() if name == "0.txt" else payload
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    assert prepare("x=webdataset:a.tar") == 0
    (source,) = read_manifest(ground / "out").sources
    assert source.samples == 1 and sum(source.skipped.values()) == 9


@pytest.mark.parametrize("suffix", ["txt", "json"])
@pytest.mark.parametrize("kind", KINDS_OF_PAYLOAD)
def test_pickles_that_say_they_are_text(kind: str, suffix: str, ground: Path) -> None:
    for reader in ("text", "text-file", "jsonl", "webdataset"):
        (ground / f"a.{suffix}").write_bytes(hostile(ground, kind))
        assert prepare(f"x={reader}:a.{suffix}") in (0, 4)


def test_pickles_in_records(ground: Path) -> None:
    payload = pickle.dumps(Calls(os.system, f"touch {ground.parent / 'canary'}"), protocol=0).decode()
    texts = [KEPT, payload, f"!!python/object/apply:os.system ['touch {ground.parent / 'canary'}']"]
    (ground / "a.jsonl").write_text("".join(json.dumps({"text": text, "__reduce__": payload}) + "\n" for text in texts))
    table = pyarrow.table({"text": texts}).replace_schema_metadata({b"pandas": payload, b"x": payload})
    parquet.write_table(table, ground / "a.parquet")
    for kind in ("jsonl", "parquet"):
        assert prepare(f"x={kind}:a.{kind}") == 0
        (ground / "out").rename(ground / f"out-{kind}")


@pytest.mark.parametrize("kind", ["text", "text-file", "jsonl", "parquet", "webdataset"])
@pytest.mark.parametrize(
    "where",
    ["pipe:touch {canary}", "|touch {canary}", "http://127.0.0.1:1/a", "file:///etc/passwd", "$(touch {canary})"],
)
def test_commands_and_addresses_are_no_files(
    where: str, kind: str, ground: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_line(capsys, prepare(f"x={kind}:{where.format(canary=ground.parent / 'canary')}"), 4)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "webdataset"])
@pytest.mark.parametrize("make", [fifo, device, folder])
def test_what_is_no_plain_file_is_not_waited_for(
    make: Callable[[Path], None], kind: str, ground: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(ground / "a")
    one_line(capsys, prepare(f"x={kind}:a"), 4)

"""What one rank alone meets ends all of them, with one line and one exit code: configurations, data, hosts."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.lives import Forked
from tests.pretrain.runs import make_data, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"), 150)


def on_hosts(folder: Path) -> None:
    """Each rank in a folder, and on a host, of its own."""
    rank = os.environ["RANK"]
    os.chdir(folder / rank)
    socket.gethostname = lambda: f"host-{rank}"


def errors(life: Forked) -> list[str]:
    return [line for line in life.printed().splitlines() if line.startswith("error: ")]


@pytest.fixture
def hosts(data: Path, tmp_path: Path) -> Path:
    """tmp_path/{0,1}: each with the data and its configuration; the runs are shared."""
    for rank in ("0", "1"):
        shutil.copytree(data, tmp_path / rank / "data")
        write_config(tmp_path, Path("data")).rename(tmp_path / rank / "tiny.yaml")
    return tmp_path


def other_rate(folder: Path) -> None:
    (folder / "tiny.yaml").write_text((folder / "tiny.yaml").read_text().replace("lr: 1e-2", "lr: 2e-2"))


def other_data(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    make_data(folder, 149, "b.txt")


def short_shard(folder: Path) -> None:
    (shard,) = (folder / "data").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-1])


def skipped_shard(folder: Path) -> None:
    short_shard(folder)
    for rank in ("0", "1"):
        path = folder.parent / rank / "tiny.yaml"
        path.write_text(path.read_text().replace("workers: 0", "workers: 0, on_bad_shard: skip"))


def wrong_tokens(folder: Path) -> None:
    (shard,) = (folder / "data").glob("*.tar")
    shard.write_bytes(b"\xff" * shard.stat().st_size)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda folder: (folder / "tiny.yaml").unlink(), 3, "config `tiny.yaml` cannot be read: "),
        (other_rate, 3, "the configuration must be the same on every rank: `optim.lr` is 0.02 on rank 1 (host-1), "),
        (lambda folder: shutil.rmtree(folder / "data"), 4, "there is no such folder (rank 1 on host-1)"),
        (other_data, 4, "the data in `data` must be the same on every rank: `index_sha256` is "),
        (short_shard, 4, "prepare the folder again or set data.on_bad_shard to skip (rank 1 on host-1)"),
        (skipped_shard, 4, "`skipped` is ['tiny-000000.tar'] on rank 1 (host-1), [] on rank 0 (host-0)"),
        (wrong_tokens, 4, "damaged: token ids beyond the vocabulary (rank 1 on host-1)"),
    ],
)
def test_of_rank_1_alone(change: Callable[[Path], None], code: int, message: str, hosts: Path) -> None:
    change(hosts / "1")
    arguments = ("train", "tiny.yaml", "train.validate_every=0", "train.sample_every=0")
    life = Forked(hosts / "log", *arguments, before=partial(on_hosts, hosts))
    assert life.wait() == [code, code], life.printed()
    (error,) = errors(life)
    assert message in error and "rank 1" in error, error
    assert "Traceback" not in life.printed()


def test_hosts_are_counted_by_their_names(hosts: Path) -> None:
    life = Forked(hosts / "log", "train", "tiny.yaml", "train.steps=1", before=partial(on_hosts, hosts))
    assert life.wait() == [0, 0], life.printed()
    assert json.loads((hosts / "runs" / "tiny" / "env.json").read_text())["hosts"] == 2
    life = Forked(
        hosts / "log", "train", hosts / "0" / "tiny.yaml", "train.steps=2", f"data.path={hosts / '0' / 'data'}"
    )
    assert life.wait() == [0, 0], life.printed()
    assert json.loads((hosts / "runs" / "tiny" / "env.json").read_text())["hosts"] == 1

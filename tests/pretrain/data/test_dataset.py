"""Reading: by fork and pickle, and every kind of damage reported by name."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data import dataset as module
from pretrain.data.dataset import RETRY_SECONDS, ShardDataset
from pretrain.data.files import npy_bytes
from pretrain.data.manifest import manifest_bytes, read_manifest, verify_folder
from pretrain.errors import DataError


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "copy")


def second_shard(folder: Path) -> Path:
    return folder / read_manifest(folder).shards[1].file


def _send_sums(dataset: ShardDataset, pipe: Connection) -> None:
    pipe.send([int(dataset.tokens(i).sum()) for i in range(len(dataset))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_the_same(prepared: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_SHARDS", 3)
    dataset = ShardDataset(prepared)
    sums = [int(dataset.tokens(i).sum()) for i in range(len(dataset))]
    assert len(dataset._descriptors) == 3
    context: Any = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send_sums, args=(dataset, send))
    process.start()
    assert receive.recv() == sums
    process.join()
    assert len(pickle.dumps(dataset)) < 500


def test_missing_and_short_shards_stop_or_are_skipped(copy: Path) -> None:
    whole = ShardDataset(copy)
    bad = second_shard(copy)
    bad.write_bytes(bad.read_bytes()[:-512])
    for _ in range(2):
        with pytest.raises(DataError, match=bad.name):
            ShardDataset(copy)
        with pytest.warns(UserWarning, match=f"{bad.name}.* samples are skipped"):
            rest = ShardDataset(copy, on_bad_shard="skip")
        assert rest.skipped == whole.manifest.shards[1].samples > 0
        left = {s: sum(map(len, rest.sources(s).values())) for s in ("train", "valid")}
        assert sum(left.values()) == len(whole) - rest.skipped
        for ids in rest.sources("train").values():
            for i in ids[:50]:
                assert np.array_equal(rest.tokens(i), whole.tokens(i))
        bad.unlink(missing_ok=True)
    assert any(bad.name in problem for problem in verify_folder(copy))


def test_a_flipped_bit_is_found(copy: Path) -> None:
    shard = second_shard(copy)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (problem,) = verify_folder(copy)
    assert shard.name in problem and "sha256" in problem


def test_ids_beyond_the_vocabulary_are_never_returned(copy: Path) -> None:
    dataset = ShardDataset(copy)
    row = dataset._index[0]
    shard = copy / dataset.manifest.shards[0].file
    content = bytearray(shard.read_bytes())
    content[row[1] : row[1] + 2] = b"\xff\xff"
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"{shard.name}.*damaged"):
        dataset.tokens(0)


def test_a_shard_that_shrinks_while_open(copy: Path) -> None:
    dataset = ShardDataset(copy)
    dataset.tokens(0)
    (copy / dataset.manifest.shards[0].file).write_bytes(b"")
    with pytest.raises(DataError, match="ends too early"):
        dataset.tokens(0)


def test_bad_index_manifest_and_tokenizer(copy: Path, tmp_path: Path) -> None:
    index = copy / "index.npy"
    good = index.read_bytes()
    index.write_bytes(good[:-8] + b"\x01" * 8)
    with pytest.raises(DataError, match=r"index\.npy.*sha256"):
        ShardDataset(copy)
    index.write_bytes(good)
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"Ġ', '"_'))
    with pytest.raises(DataError, match="must be the tokenizer of the manifest"):
        ShardDataset(copy)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('-000000.tar"', '/../../x.tar"'))
    with pytest.raises(DataError, match=r"manifest\.json` is broken"):
        ShardDataset(copy)
    with pytest.raises(DataError, match="no such folder"):
        ShardDataset(tmp_path / "nowhere")
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match="finished `prepare`"):
        ShardDataset(copy)


class Stumbling:
    """os.pread of a mounted object store: short answers, and errors before some of them."""

    def __init__(self, errors: list[int]) -> None:
        self.errors, self.real, self.calls = errors, os.pread, 0

    def __call__(self, descriptor: int, count: int, offset: int) -> bytes:
        self.calls += 1
        if self.errors:
            raise OSError(self.errors.pop(0), "the store stumbles")
        return self.real(descriptor, min(count, 7), offset)


def test_reads_that_stumble_are_tried_again(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ShardDataset(prepared)
    wanted, pauses = whole.tokens(3), list[float]()
    monkeypatch.setattr(time, "sleep", pauses.append)
    store = Stumbling([errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
    monkeypatch.setattr(os, "pread", store)
    mounted = ShardDataset(prepared)
    assert np.array_equal(mounted.tokens(3), wanted) and store.calls > 4
    assert pauses == list(RETRY_SECONDS)
    assert all(np.array_equal(mounted.sentences(n), whole.sentences(n)) for n in range(20))


@pytest.mark.parametrize(("code", "pauses"), [(errno.EIO, 3), (errno.EACCES, 0)])
def test_a_store_that_stays_away_is_named(
    code: int, pauses: int, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, slept = ShardDataset(prepared), list[float]()
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(os, "pread", Stumbling([code] * 99))
    with pytest.raises(DataError, match=r"shard `.*hills-000000\.tar` cannot be read"):
        dataset.tokens(0)
    assert len(slept) == pauses


def test_a_stale_handle_that_cannot_even_be_closed(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, close = ShardDataset(prepared), os.close
    wanted = dataset.tokens(0)

    def stale(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.ESTALE, "stale")

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "pread", Stumbling([errno.ESTALE, errno.EIO]))
    monkeypatch.setattr(os, "close", stale)
    assert np.array_equal(dataset.tokens(0), wanted)


def _read_as_nobody(folder: Path, pipe: Connection) -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        (folder / "new").write_text("")
    except PermissionError:
        dataset = ShardDataset(folder)
        pipe.send([int(dataset.tokens(i).sum()) for i in range(len(dataset))])
    else:
        pipe.send("the folder can be written to")


def test_a_folder_that_cannot_be_written_to(prepared: Path) -> None:
    whole = ShardDataset(prepared)
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folders are closed to everybody else
        Path(outside).chmod(0o755)
        folder = shutil.copytree(prepared, Path(outside) / "data")
        folder.chmod(0o555)
        context = multiprocessing.get_context("fork")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_read_as_nobody, args=(folder, send))
        process.start()
        send.close()
        assert receive.recv() == [int(whole.tokens(i).sum()) for i in range(len(whole))]
        process.join()
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("column", "value"),
    [(0, 999), (0, -1), (1, -1), (1, 1 << 40), (2, 0), (2, -5), (2, 1 << 62), (3, 1 << 50), (4, 0), (5, 7)],
)
def test_an_index_that_leads_out_of_its_shards(column: int, value: int, copy: Path) -> None:
    """Sealed anew, as a broken program might: the hashes are right."""
    index = np.load(copy / "index.npy")
    index[3, column] = value
    (copy / "index.npy").write_bytes(npy_bytes(index))
    digest = hashlib.sha256((copy / "index.npy").read_bytes()).hexdigest()
    manifest = read_manifest(copy).model_copy(update={"index_sha256": digest})
    (copy / "manifest.json").write_bytes(manifest_bytes(manifest))
    with pytest.raises(DataError, match=r"sample 3 must lie inside a shard"):
        ShardDataset(copy)
    assert any("sample 3" in problem for problem in verify_folder(copy))


def test_a_vocabulary_that_is_not_the_tokenizers(copy: Path) -> None:
    manifest = read_manifest(copy).model_copy(update={"vocab_size": 100_000})
    (copy / "manifest.json").write_bytes(manifest_bytes(manifest))
    assert any("`vocab_size` and `token_dtype` must be 400 and uint16" in problem for problem in verify_folder(copy))

"""Random access to the samples of a data folder: one row of the index, one `pread`, no parsing.

A sample id is a row of index.npy. Shards are opened when first read. A read carries its own file offset, so a
forked worker may share the descriptors of its parent; a pickled dataset is only its path and reopens there.
"""

import collections
import contextlib
import errno
import os
import time
import warnings
from pathlib import Path
from typing import Literal

import numpy as np

from pretrain.data.files import read_at
from pretrain.data.manifest import (
    N_SENTENCES,
    N_TOKENS,
    SENTENCES_AT,
    SHARD,
    SPLIT,
    TOKENS_AT,
    TRAIN,
    VALID,
    read_index,
    read_manifest,
    read_tokenizer,
    shard_problem,
)
from pretrain.errors import DataError
from pretrain.plain import open_plain

OPEN_SHARDS = 256
# What a network file system or a mounted object store says when it may have recovered a moment later.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ENOTCONN, errno.EREMOTEIO}
RETRY_SECONDS = (0.1, 1.0, 5.0)
Split = Literal["train", "valid"]


class ShardDataset:
    """Samples of a folder that `prepare` finished.

    lengths: int32 [n] tokens of each sample. tokenizer: the one the shards were written with. manifest: what the
    folder says of itself. skipped: samples of bad shards, in no split. skipped_shards: names of those.
    """

    def __init__(self, path: str | Path, on_bad_shard: Literal["stop", "skip"] = "stop") -> None:
        """Opens `path`, checks index, tokenizer and the size of every shard.

        Raises:
            DataError: a bad folder; a bad shard by name, unless `on_bad_shard` is "skip": then its samples are left
                out of every split, counted in `skipped` and warned about.
        """
        self.path, self.on_bad_shard = Path(path), on_bad_shard
        self.manifest = read_manifest(self.path)
        self.tokenizer = read_tokenizer(self.path, self.manifest)
        self._index = read_index(self.path, self.manifest)
        self._dtype = np.dtype(self.manifest.token_dtype).newbyteorder("<")
        self._descriptors: collections.OrderedDict[int, int] = collections.OrderedDict()
        self.lengths = self._index[:, N_TOKENS].astype(np.int32)
        bad = self._bad_shards()
        self.skipped_shards = [self.manifest.shards[number].file for number in bad]
        readable = ~np.isin(self._index[:, SHARD], bad)
        self.skipped = int((~readable).sum())
        self._splits = {
            "train": self._ids(readable & (self._index[:, SPLIT] == TRAIN)),
            "valid": self._ids(readable & (self._index[:, SPLIT] == VALID)),
        }

    def sources(self, split: Split) -> dict[str, np.ndarray]:
        """{source name: sample ids, int64, in the order of the documents} of "train" or "valid"."""
        return self._splits[split]

    def tokens(self, sample_id: int) -> np.ndarray:
        """Tokens of a sample without special ids, int32 [N]; raises `DataError` naming a shard that is broken."""
        row = self._index[sample_id]
        raw = self._read(int(row[SHARD]), int(row[TOKENS_AT]), int(row[N_TOKENS]) * self._dtype.itemsize)
        tokens = np.frombuffer(raw, self._dtype).astype(np.int32)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.manifest.vocab_size:
            raise DataError(f"shard `{self._file(int(row[SHARD]))}` is damaged: token ids beyond the vocabulary")
        return tokens

    def sentences(self, sample_id: int) -> np.ndarray:
        """Where each sentence of a sample begins in its tokens, int32 [sentences], the first is 0."""
        row = self._index[sample_id]
        raw = self._read(int(row[SHARD]), int(row[SENTENCES_AT]), int(row[N_SENTENCES]) * 4)
        return np.frombuffer(raw, "<i4").astype(np.int32)

    def text(self, sample_id: int) -> str:
        """The sample as text."""
        return self.tokenizer.decode(self.tokens(sample_id)).strip()

    def __len__(self) -> int:
        return len(self._index)

    def __reduce__(self) -> tuple[object, ...]:
        return ShardDataset, (self.path, self.on_bad_shard)

    def _bad_shards(self) -> list[int]:
        bad: list[int] = []
        for number, shard in enumerate(self.manifest.shards):
            problem = shard_problem(self.path, shard, checksum=False)
            if problem and self.on_bad_shard == "stop":
                raise DataError(f"{problem}; prepare the folder again or set data.on_bad_shard to skip")
            if problem:
                warnings.warn(f"{problem}: {shard.samples} samples are skipped", stacklevel=3)
                bad.append(number)
        return bad

    def _ids(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """{source name: ids of its samples that are `chosen`, bool [n]}."""
        source_of_shard = np.array([shard.source for shard in self.manifest.shards])
        ids = np.flatnonzero(chosen)
        names = source_of_shard[self._index[ids, SHARD]] if len(ids) else np.empty(0, str)
        return {source.name: ids[names == source.name] for source in self.manifest.sources}

    def _file(self, shard: int) -> Path:
        return self.path / self.manifest.shards[shard].file

    def _read(self, shard: int, offset: int, count: int) -> bytes:
        for pause in (*RETRY_SECONDS, None):
            try:
                raw = read_at(self._descriptor(shard), count, offset)
                break
            except OSError as error:
                if pause is None or error.errno not in TRANSIENT:
                    raise DataError(f"shard `{self._file(shard)}` cannot be read: {error.strerror}") from None
                # A handle that has gone stale stays so: open the file anew.
                if (descriptor := self._descriptors.pop(shard, None)) is not None:
                    _close(descriptor)
                time.sleep(pause)
        if len(raw) != count:
            raise DataError(f"shard `{self._file(shard)}` ends too early: {count} bytes at {offset}, got {len(raw)}")
        return raw

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) >= OPEN_SHARDS:
                _close(self._descriptors.popitem(last=False)[1])
            with open_plain(self._file(shard), follow=True) as file:
                self._descriptors[shard] = os.dup(file.fileno())
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            _close(descriptor)


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a mounted store may report an earlier failure once more; nothing was written
        os.close(descriptor)

"""One unit of documents to one tar shard: clean, split, tokenise, pack, write. Runs in a worker process.

The bytes depend on the unit, the tokenizer and `Plan` alone. Each shard gets a JSON record (counts, sha256, index
rows) after it is in place; a shard with a record is never made again.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.config import Section
from pretrain.data.files import NPY_HEADER_BYTES, npy_bytes, write_atomic
from pretrain.data.manifest import TRAIN, VALID, ShardEntry, token_dtype
from pretrain.data.text import clean, sentences
from pretrain.data.tokenizer import TextTokenizer
from pretrain.errors import DataError

# A shorter text leaves nothing to predict once a part of it is masked.
MIN_TOKENS = 4
PARTS_FOLDER = "parts"
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Unit:
    """Consecutive documents of one source, the content of one shard. digest: sha256 of the documents."""

    source: str
    number: int
    documents: tuple[str, ...]
    digest: str
    text_bytes: int

    @property
    def file(self) -> str:
        """Name of the shard."""
        return f"{self.source}-{self.number:06d}.tar"


class ShardRecord(Section):
    """What is known of a finished shard.

    rows: (tokens offset, n tokens, sentences offset, n sentences, split) of each sample. too_short: documents that gave
    no sample. replaced: documents with U+FFFD, which stands for what could not be decoded, here or earlier.
    """

    entry: ShardEntry
    digest: str
    words: int
    tokens: int
    too_short: int
    replaced: int = 0
    rows: tuple[tuple[int, int, int, int, int], ...]


def record_path(folder: Path, shard_file: str) -> Path:
    """Where the record of a shard lies while the folder is unfinished."""
    return folder / PARTS_FOLDER / f"{shard_file}.json"


def write_shard(folder: Path, unit: Unit, tokenizer: TextTokenizer, max_length: int, valid_permille: int) -> None:
    """Writes the shard of `unit` and its record; a kill at any moment leaves the record only with a whole shard."""
    dtype = token_dtype(tokenizer.vocab_size)
    content = io.BytesIO()
    rows: list[tuple[int, int, int, int, int]] = []
    words = too_short = replaced = 0
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for document in unit.documents:
            parts = list(sentences(clean(document)))
            text = " ".join(parts)
            words += text.count(" ") + 1 if parts else 0
            split = split_of(text, valid_permille)
            before = len(rows)
            for tokens, starts in pack(encode_sentences(parts, tokenizer), max_length - 2, tokenizer.word_starts):
                key = f"{unit.source}-{unit.number:06d}-{len(rows):08d}"
                tokens_at = _add(tar, f"{key}.tokens.npy", npy_bytes(tokens.astype(dtype)))
                sentences_at = _add(tar, f"{key}.sentences.npy", npy_bytes(starts.astype(np.int32)))
                rows.append((tokens_at, len(tokens), sentences_at, len(starts), split))
            too_short += len(rows) == before
            replaced += REPLACEMENT in text
    body = content.getvalue()
    write_atomic(folder / unit.file, body)
    entry = ShardEntry(
        file=unit.file,
        source=unit.source,
        sha256=hashlib.sha256(body).hexdigest(),
        bytes=len(body),
        documents=len(unit.documents),
        samples=len(rows),
    )
    n_tokens = sum(row[1] for row in rows)
    record = ShardRecord(
        entry=entry,
        digest=unit.digest,
        words=words,
        tokens=n_tokens,
        too_short=too_short,
        replaced=replaced,
        rows=tuple(rows),
    )
    write_atomic(record_path(folder, unit.file), record.model_dump_json().encode())


def split_of(text: str, valid_permille: int) -> int:
    """TRAIN or VALID by the hash of the document: the same text is never in both."""
    digest = hashlib.sha256(text.encode()).digest()
    return VALID if int.from_bytes(digest[:8], "little") % 1000 < valid_permille else TRAIN


def encode_sentences(parts: Sequence[str], tokenizer: TextTokenizer) -> list[np.ndarray]:
    """Ids of each sentence, int32 [n]; all but the first begin with the space before them.

    So the ids of a document, joined, decode to its sentences joined by single spaces.
    """
    return tokenizer.encode_batch([part if index == 0 else f" {part}" for index, part in enumerate(parts)])


def pack(
    encoded: Sequence[np.ndarray], budget: int, word_starts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Samples of one document: (tokens [N], sentence starts [sentences]) with N at most `budget`.

    Whole sentences are taken in order while they fit. A sentence longer than `budget` is cut, at the last beginning of
    a word that fits. Samples shorter than `MIN_TOKENS` are dropped.
    """
    taken: list[np.ndarray] = []
    length = 0
    for piece in _cut(encoded, budget, word_starts):
        if length + len(piece) > budget:
            yield from _sample(taken)
            taken, length = [], 0
        taken.append(piece)
        length += len(piece)
    yield from _sample(taken)


def _cut(encoded: Sequence[np.ndarray], budget: int, word_starts: np.ndarray) -> Iterator[np.ndarray]:
    for tokens in encoded:
        rest = tokens
        while len(rest) > budget:
            begins = np.flatnonzero(word_starts[rest[1 : budget + 1]])
            end = int(begins[-1]) + 1 if len(begins) else budget
            yield rest[:end]
            rest = rest[end:]
        if len(rest):
            yield rest


def _sample(taken: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    lengths = [len(piece) for piece in taken]
    if sum(lengths) >= MIN_TOKENS:
        yield np.concatenate(taken), np.cumsum([0, *lengths[:-1]])


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Appends a member with fixed owner, mode and time; returns the offset of its array data in the tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o644
    at = tar.offset + tarfile.BLOCKSIZE + NPY_HEADER_BYTES
    tar.addfile(member, io.BytesIO(content))
    return at


def check_max_length(max_length: int) -> None:
    """Raises `DataError` where BOS, EOS and the shortest sample do not fit."""
    if not MIN_TOKENS + 2 <= max_length <= 1 << 16:
        raise DataError(f"max length must be from {MIN_TOKENS + 2} to {1 << 16} tokens, got {max_length}")

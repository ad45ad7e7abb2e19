"""What a data folder holds: `manifest.json`, `index.npy`, `tokenizer.json` and the shards they describe.

The manifest is written last; a folder without one is unfinished. `Plan` is what was asked for, the rest is
what came out. `index.npy` is int64 [samples, 6] with the columns named here.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from pretrain.config import Section
from pretrain.data.files import NPY_HEADER_BYTES, npy_header, sha256_of
from pretrain.data.tokenizer import TOKENIZER_FILE, TextTokenizer
from pretrain.errors import DataError
from pretrain.plain import open_plain, read_plain

MANIFEST_FILE, INDEX_FILE = "manifest.json", "index.npy"
FORMAT = 2
SectionT = TypeVar("SectionT", bound=Section)
SHARD, TOKENS_AT, N_TOKENS, SENTENCES_AT, N_SENTENCES, SPLIT = range(6)
COLUMNS = 6
TRAIN, VALID = 0, 1
SHARD_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}-\d{6,}\.tar$"


class Plan(Section):
    """Everything the bytes of a data folder depend on besides the text itself.

    sources: the `--source` strings. tokenizer_sha256: of the given tokenizer, null when one of `train_vocab` tokens
    is trained. shard_bytes: text bytes of one shard. python: version whose documentation `stdlib-docs` is, else null.
    """

    format: int = FORMAT
    sources: tuple[str, ...]
    tokenizer_sha256: str | None
    train_vocab: int | None
    max_length: int
    valid_permille: int
    shard_bytes: int
    licence: str
    python: str | None


class SourceEntry(Section):
    """Counts of one source; `tokens` are without BOS and EOS. skipped: documents left out, by reason."""

    name: str
    licence: str
    documents: int
    words: int
    samples: int
    valid_samples: int
    tokens: int
    skipped: dict[str, int]


class ShardEntry(Section):
    """One tar file."""

    file: str = Field(pattern=SHARD_NAME)
    source: str
    sha256: str
    bytes: int = Field(ge=0)
    documents: int
    samples: int


class Manifest(Section):
    """The whole of `manifest.json`. token_dtype: of the `.tokens.npy` members."""

    plan: Plan
    tokenizer_sha256: str
    vocab_size: int
    token_dtype: str = Field(pattern=r"^(uint16|int32)$")
    samples: int
    tokens: int
    index_sha256: str
    sources: tuple[SourceEntry, ...]
    shards: tuple[ShardEntry, ...]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Type of stored tokens: uint16 where every id fits."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def to_json(section: Section) -> bytes:
    """The bytes of a section as JSON with sorted keys."""
    return (json.dumps(section.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def manifest_bytes(manifest: Manifest) -> bytes:
    """The one text of a manifest; it ends with the sha256 of the rest, so that no flipped bit goes unseen."""
    digest = hashlib.sha256(to_json(manifest)).hexdigest()
    values = {**manifest.model_dump(mode="json"), "sha256": digest}
    return (json.dumps(values, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: str | Path) -> Manifest:
    """Reads `folder`/manifest.json; raises `DataError` when absent, damaged or of another format."""
    file = Path(folder) / MANIFEST_FILE
    try:
        text = read_plain(file)
    except OSError as error:
        state = f"manifest.json cannot be read: {error.strerror}"
        if not file.exists():
            state = "it holds no manifest.json" if Path(folder).is_dir() else "there is no such folder"
        raise DataError(f"data folder `{folder}` must come from a finished `prepare`: {state}") from None
    try:
        values = json.loads(text)
        made_by, _ = values["plan"]["format"], values.pop("sha256", None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"`{file}` is broken: it must be the JSON that `prepare` wrote") from None
    if made_by != FORMAT:
        raise DataError(f"`{file}`: `format` must be {FORMAT}, is {made_by!r:.40}: prepare the folder again")
    manifest = parse_section(Manifest, json.dumps(values).encode(), str(file))
    if manifest_bytes(manifest) != text:
        raise DataError(f"`{file}` is damaged: it does not match its own sha256")
    return manifest


def parse_section(kind: type[SectionT], text: bytes, where: str) -> SectionT:
    """Builds `kind` from JSON; raises `DataError` quoting the first problem."""
    try:
        return kind.model_validate_json(text, strict=False)  # JSON has no tuples
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise DataError(f"`{where}` is broken: `{path}` {first['msg']}") from None


def read_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """Maps index.npy, int64 [samples, 6], after checking its sha256; raises `DataError`."""
    file = folder / INDEX_FILE
    try:
        if sha256_of(file) != manifest.index_sha256:
            raise DataError(f"`{file}` does not match manifest.json (sha256): prepare the folder again")
        shape, dtype = (manifest.samples, COLUMNS), np.dtype(np.int64)
        with open_plain(file, follow=True) as opened:
            header = opened.read(NPY_HEADER_BYTES)
        if header != npy_header(shape, dtype) or file.stat().st_size != len(header) + 8 * COLUMNS * manifest.samples:
            raise DataError(f"`{file}` must be int64 [{manifest.samples}, {COLUMNS}], as `prepare` writes it")
        index: np.ndarray = (
            np.memmap(file, dtype, "r", len(header), shape) if manifest.samples else np.empty(shape, dtype)
        )
    except (OSError, ValueError) as error:
        raise DataError(f"`{file}` cannot be read: {error}") from None
    wrong = np.flatnonzero(~_inside(index, manifest))
    if len(wrong):
        raise DataError(f"`{file}`: sample {wrong[0]} must lie inside a shard, its row is {index[wrong[0]].tolist()}")
    return np.asarray(index)


def _inside(index: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Whether the row of each sample names a shard, a split and places inside that shard; bool [samples]."""
    bytes_of = np.array([shard.bytes for shard in manifest.shards] or [0], np.int64)
    known = (index[:, SHARD] >= 0) & (index[:, SHARD] < len(manifest.shards))
    within = bytes_of[np.where(known, index[:, SHARD], 0)]
    good = known & np.isin(index[:, SPLIT], (TRAIN, VALID))
    for at, count, size in (
        (TOKENS_AT, N_TOKENS, np.dtype(manifest.token_dtype).itemsize), (SENTENCES_AT, N_SENTENCES, 4)
    ):  # fmt: skip
        start, length = index[:, at], index[:, count]
        # the first two keep the product from overflowing
        good &= (start >= 0) & (start <= within) & (length > 0) & (length <= within)
        good &= start + size * np.minimum(length, within) <= within
    return good


def read_tokenizer(folder: Path, manifest: Manifest) -> TextTokenizer:
    """The tokenizer the shards were written with; raises `DataError` if the file is another one."""
    file = folder / TOKENIZER_FILE
    tokenizer = TextTokenizer.from_path(file)
    # The file itself, not only what it means: `prepare` wrote the canonical text.
    if tokenizer.sha256 == manifest.tokenizer_sha256 != sha256_of(file):
        raise DataError(f"`{file}` is not byte for byte what `prepare` wrote: copy it anew")
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"`{folder / TOKENIZER_FILE}` must be the tokenizer of the manifest ({manifest.tokenizer_sha256[:12]}), "
            f"it is {tokenizer.sha256[:12]}"
        )
    dtype = token_dtype(tokenizer.vocab_size).name
    if (manifest.vocab_size, manifest.token_dtype) != (tokenizer.vocab_size, dtype):
        raise DataError(
            f"`{folder / MANIFEST_FILE}`: `vocab_size` and `token_dtype` must be {tokenizer.vocab_size} and {dtype}, "
            f"as the tokenizer has them, they are {manifest.vocab_size} and {manifest.token_dtype}"
        )
    return tokenizer


def shard_problem(folder: Path, shard: ShardEntry, checksum: bool) -> str | None:
    """What is wrong with a shard, or None. `checksum` also reads all of it."""
    file = folder / shard.file
    try:
        size = file.stat().st_size
        if size != shard.bytes:
            return f"shard `{file}` must have {shard.bytes} bytes, it has {size}"
        if checksum and sha256_of(file) != shard.sha256:
            return f"shard `{file}` does not match its sha256 in manifest.json"
    except OSError as error:
        return f"shard `{file}` cannot be read: {error.strerror}"
    return None


def verify_folder(folder: str | Path) -> list[str]:
    """Every problem of a data folder, reading all of it; empty when it is sound.

    The hashes cover all bits: a shard holds what the index says because both were written, and hashed, together.
    """
    root = Path(folder)
    try:
        manifest = read_manifest(root)
    except DataError as error:
        return [str(error)]
    known = {MANIFEST_FILE, INDEX_FILE, TOKENIZER_FILE, *(shard.file for shard in manifest.shards)}
    problems = [problem for shard in manifest.shards if (problem := shard_problem(root, shard, checksum=True))]
    for check in (read_index, read_tokenizer):
        try:
            check(root, manifest)
        except DataError as error:
            problems.append(str(error))
    return [
        *problems,
        *(f"`{path}` is not in the manifest" for path in sorted(root.iterdir()) if path.name not in known),
    ]

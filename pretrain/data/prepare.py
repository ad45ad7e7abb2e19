"""`prepare`: sources to shards, resumable shard by shard and byte-identical for any number of workers.

The parent reads the sources and cuts them into units of consecutive documents by text size; a worker turns a unit
into a shard. Unfinished work lies in OUT/parts; the manifest, written last, ends it. After a kill the same
command continues: units are read again, and those whose shard has a record are skipped.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from pretrain.data.files import npy_bytes, write_atomic
from pretrain.data.manifest import (
    COLUMNS,
    INDEX_FILE,
    MANIFEST_FILE,
    SPLIT,
    VALID,
    Manifest,
    Plan,
    SourceEntry,
    manifest_bytes,
    parse_section,
    read_manifest,
    shard_problem,
    to_json,
    token_dtype,
)
from pretrain.data.meter import Meter
from pretrain.data.shard_pool import write_shards
from pretrain.data.shards import MIN_TOKENS, PARTS_FOLDER, ShardRecord, check_max_length, record_path
from pretrain.data.sources import Source, parse_sources
from pretrain.data.text import clean, sentences
from pretrain.data.tokenizer import TOKENIZER_FILE, TextTokenizer, check_vocab_size, train_bpe
from pretrain.errors import NO_LOCK_ERRNOS, DataError
from pretrain.plain import read_plain

SHARD_BYTES = 16 << 20
TOKENIZER_TRAINING_BYTES = 256 << 20
TOO_SHORT = f"shorter than {MIN_TOKENS} tokens"
PLAN_FILE, LOCK_FILE = "plan.json", "lock"


def prepare(
    out: str | Path,
    sources: Sequence[str],
    tokenizer: str | None = None,
    train_vocab: int | None = None,
    workers: int = 1,
    max_length: int = 512,
    valid_permille: int = 10,
    shard_bytes: int = SHARD_BYTES,
    licence: str = "not stated",
) -> Manifest:
    """Writes (or finishes) the data folder `out` and returns its manifest.

    Args:
        out: a new or empty folder, or one that an earlier run with the same arguments left.
        sources: `[NAME=]KIND[:ARGUMENT]`, see `pretrain.data.sources`.
        tokenizer: a tokenizer.json, a folder with one or the id of a Hugging Face repository with one; or
        train_vocab: size of a byte-level BPE to train on the sources. Exactly one of the two.
        workers: processes that write shards; 1 works in this process.
        max_length: tokens of a sample at most, BOS and EOS counted.
        valid_permille: documents of 1,000 that go to the validation split.
        shard_bytes: text bytes after which a shard ends.
        licence: note for the manifest about text sources, whose licence nothing else tells.

    Raises:
        DataError: bad or empty source, bad tokenizer, or `out` belongs to another plan.
        DiskError: the disk is full or read-only.
    """
    if (tokenizer is None) == (train_vocab is None):
        raise DataError("give exactly one of `--tokenizer` and `--train-tokenizer`")
    _check_range("workers", workers, 1, 256)
    _check_range("valid_permille", valid_permille, 0, 999)
    _check_range("shard_bytes", shard_bytes, 1, 1 << 30)
    check_max_length(max_length)
    parsed = [source.pinned() for source in parse_sources(sources)]
    given = TextTokenizer.from_path_or_hub(tokenizer) if tokenizer is not None else None
    plan = Plan(
        sources=tuple(source.spec for source in parsed),
        tokenizer_sha256=given.sha256 if given else None,
        train_vocab=train_vocab,
        max_length=max_length,
        valid_permille=valid_permille,
        shard_bytes=shard_bytes,
        licence=licence,
        python=platform.python_version() if any(source.kind == "stdlib-docs" for source in parsed) else None,
    )
    folder = Path(out)
    if not (folder / MANIFEST_FILE).exists():
        # Before the folder is claimed for a plan, so that a wrong path or number can be put right.
        if train_vocab is not None:
            check_vocab_size(train_vocab)
        _check_not_empty(parsed)
    if (finished := _look(folder, plan)) is not None:
        return finished
    with _locked(folder):
        # Once more, now that nobody else writes there: another process may have begun, or finished, a moment ago.
        if (finished := _look(folder, plan)) is not None:
            return finished
        write_atomic(folder / PARTS_FOLDER / PLAN_FILE, to_json(plan))
        text_tokenizer = _settle_tokenizer(folder, parsed, given, train_vocab)
        files, skipped = write_shards(folder, parsed, text_tokenizer, plan, workers)
        manifest = _finish(folder, parsed, text_tokenizer, plan, files, skipped)
    for source in manifest.sources:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in source.skipped.items())
        if reasons:
            print(f"source {source.name}: left out {reasons}", file=sys.stderr, flush=True)
    documents = sum(source.documents for source in manifest.sources)
    counted = f"{documents:,} documents, {manifest.samples:,} samples, {manifest.tokens:,} tokens"
    made = f"vocabulary {manifest.vocab_size:,}, {len(manifest.shards)} shards"
    print(f"data {folder}: {counted}, {made}", file=sys.stderr, flush=True)
    return manifest


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise DataError(f"`{name}` must be from {low} to {high}, got {value}")


def _check_not_empty(sources: Sequence[Source]) -> None:
    for source in sources:
        skipped = Counter[str]()
        if next(source.documents(skipped), None) is None:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
            found = f"all of it was left out: {reasons}" if reasons else "it is empty"
            raise DataError(f"source `{source.name}` must hold text, {found}")


def _look(folder: Path, plan: Plan) -> Manifest | None:
    """The manifest if all is done already; raises `DataError` where `folder` holds anything but work on `plan`."""
    plan_file = folder / PARTS_FOLDER / PLAN_FILE
    # Before plan and manifest: what another process has written by now is never without one of the two.
    strange = folder.exists() and (not folder.is_dir() or any(one.name != PARTS_FOLDER for one in folder.iterdir()))
    if (folder / MANIFEST_FILE).exists():
        manifest = read_manifest(folder)
        _same_plan(folder, manifest.plan, plan)
        problems = [problem for shard in manifest.shards if (problem := shard_problem(folder, shard, checksum=False))]
        if problems:
            raise DataError(f"{problems[0]}: delete `{folder}` and prepare it again")
        shutil.rmtree(folder / PARTS_FOLDER, ignore_errors=True)
        return manifest
    if plan_file.exists():
        _same_plan(folder, parse_section(Plan, read_plain(plan_file), str(plan_file)), plan)
        return None
    if (folder / MANIFEST_FILE).exists():  # finished since the first lines
        return _look(folder, plan)
    # A kill before the plan was in place leaves nothing but this folder and temporary files in it.
    if strange:
        raise DataError(f"`{folder}` must be empty or a folder that `prepare` began, it holds other files")
    return None


def _same_plan(folder: Path, old: Plan, new: Plan) -> None:
    for name in Plan.model_fields:
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            raise DataError(f"`{folder}` was prepared with {name} {before!r}, now it is {now!r}: use another folder")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Creates the folder and holds it against a second `prepare`; the kernel lets go when the process dies.

    What unfinished work needs is deleted when nothing is left to do.
    """
    lock = _lock(folder)
    try:
        _sweep(folder)
        yield
        _sweep(folder)  # a worker of a job that was killed a moment ago may have outlived the first
        shutil.rmtree(folder / PARTS_FOLDER, ignore_errors=True)  # with another process that sees the manifest
    finally:
        os.close(lock)


def _lock(folder: Path) -> int:
    """The descriptor of the lock, held until it is closed."""
    parts = folder / PARTS_FOLDER
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"`{folder}` cannot be created: {error.strerror}") from None
        with suppress(FileNotFoundError):  # deleted by a process that has just finished: make it anew
            lock = os.open(parts / LOCK_FILE, flags, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), (parts / LOCK_FILE).lstat()):
                    return lock
            except BlockingIOError:
                os.close(lock)
                raise DataError(f"`{folder}` is being prepared by another process") from None
            except OSError as error:
                if error.errno in NO_LOCK_ERRNOS:
                    warnings.warn(f"`{folder}` is on a file system without locks: never start two", stacklevel=2)
                    return lock
                os.close(lock)
                raise
            os.close(lock)


def _sweep(folder: Path) -> None:
    """Deletes what was being written when an earlier job was killed."""
    for left_over in [*folder.glob(".*.tmp"), *(folder / PARTS_FOLDER).glob(".*.tmp")]:
        left_over.unlink(missing_ok=True)


def _settle_tokenizer(
    folder: Path, sources: Sequence[Source], given: TextTokenizer | None, train_vocab: int | None
) -> TextTokenizer:
    """The tokenizer of the folder: copied, or trained once and then read again after a kill."""
    if given is None and (folder / TOKENIZER_FILE).exists():
        return TextTokenizer.from_path(folder)
    tokenizer = given or train_bpe(_training_texts(sources), train_vocab or 0)
    tokenizer.save(folder)
    return tokenizer


def _training_texts(sources: Sequence[Source]) -> Iterator[str]:
    """Documents from the beginning of every source, so that each has an equal share of the training bytes."""
    budget = TOKENIZER_TRAINING_BYTES // len(sources)
    total = sum(min(source.text_bytes(), budget) for source in sources)
    with Meter("training the tokenizer", total) as meter:
        for source in sources:
            taken = 0
            for document in source.documents():
                if taken >= budget:
                    break
                size = len(document)
                taken += size
                meter.add(size)
                # Training sees what encoding will see: clean sentences with single spaces.
                yield " ".join(sentences(clean(document)))


def _finish(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: TextTokenizer,
    plan: Plan,
    files: Sequence[str],
    skipped: Mapping[str, Counter[str]],
) -> Manifest:
    """Joins the records into index and manifest, and tells what no manifest counts."""
    records = [
        parse_section(ShardRecord, read_plain(record_path(folder, file)), str(record_path(folder, file)))
        for file in files
    ]
    index = np.concatenate(
        [np.empty((0, COLUMNS), np.int64)]
        + [_index_rows(number, record) for number, record in enumerate(records) if record.rows]
    )
    index_bytes = npy_bytes(index)
    entries = tuple(_source_entry(source, records, plan.licence, skipped[source.name]) for source in sources)
    empty = [entry.name for entry in entries if not entry.samples]
    if empty:
        raise DataError(f"source `{empty[0]}` must hold text, its documents give no sample at all")
    manifest = Manifest(
        plan=plan,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        token_dtype=token_dtype(tokenizer.vocab_size).name,
        samples=len(index),
        tokens=sum(record.tokens for record in records),
        index_sha256=hashlib.sha256(index_bytes).hexdigest(),
        sources=entries,
        shards=tuple(record.entry for record in records),
    )
    write_atomic(folder / INDEX_FILE, index_bytes)
    write_atomic(folder / MANIFEST_FILE, manifest_bytes(manifest))
    for source in sources:
        count = sum(record.replaced for record in records if record.entry.source == source.name)
        if count:
            told = (
                f"source {source.name}: {count:,} documents hold U+FFFD, text that was decoded wrongly; they are kept"
            )
            print(told, file=sys.stderr, flush=True)
    return manifest


def _index_rows(number: int, record: ShardRecord) -> np.ndarray:
    """Rows of index.npy for the shard of this number, int64 [samples, 6]."""
    rows = np.array(record.rows, np.int64)
    return np.concatenate([np.full((len(rows), 1), number, np.int64), rows], axis=1)


def _source_entry(
    source: Source, records: Sequence[ShardRecord], licence: str, skipped: Mapping[str, int]
) -> SourceEntry:
    mine = [record for record in records if record.entry.source == source.name]
    too_short = sum(record.too_short for record in mine)
    left_out = {**skipped, **({TOO_SHORT: too_short} if too_short else {})}
    return SourceEntry(
        name=source.name,
        licence=source.licence or licence,
        documents=sum(record.entry.documents for record in mine),
        words=sum(record.words for record in mine),
        samples=sum(record.entry.samples for record in mine),
        valid_samples=sum(row[SPLIT - 1] == VALID for record in mine for row in record.rows),
        tokens=sum(record.tokens for record in mine),
        skipped=dict(sorted(left_out.items())),
    )

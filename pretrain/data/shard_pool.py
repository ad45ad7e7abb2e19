"""Units of documents, and the processes that turn them into shards."""

import hashlib
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from pretrain.data.manifest import Plan, parse_section, shard_problem
from pretrain.data.meter import Meter
from pretrain.data.shards import ShardRecord, Unit, record_path, write_shard
from pretrain.data.sources import Source
from pretrain.data.tokenizer import TextTokenizer
from pretrain.errors import DataError
from pretrain.plain import read_plain

# Enough that a worker never waits for the reader, little enough that few units lie in memory.
WAITING_UNITS_PER_WORKER = 2

_tokenizer_of_process: TextTokenizer | None = None


def write_shards(
    folder: Path, sources: Sequence[Source], tokenizer: TextTokenizer, plan: Plan, workers: int
) -> tuple[list[str], dict[str, Counter[str]]]:
    """Makes every shard that has no record yet.

    Returns:
        the names of all shards, in order, and {source name: how many of its documents were left out, by reason}.
    """
    files: list[str] = []
    skipped = {source.name: Counter[str]() for source in sources}
    total = sum(source.text_bytes() for source in sources)
    with Meter("writing shards", total) as meter, _pool(folder, tokenizer, plan, workers) as submit:
        for source in sources:
            for unit in units(source, plan.shard_bytes, skipped[source.name]):
                files.append(unit.file)
                if not _recorded(folder, unit):
                    submit(unit)
                meter.add(unit.text_bytes)
    return files, skipped


def units(source: Source, shard_bytes: int, skipped: Counter[str] | None = None) -> Iterator[Unit]:
    """Cuts the documents of `source` into units that end once they reach `shard_bytes`; counts those left out."""
    documents: list[str] = []
    number, size = 0, 0
    digest = hashlib.sha256()
    for document in source.documents(skipped):
        encoded = document.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        documents.append(document)
        size += len(encoded)
        if size >= shard_bytes:
            yield Unit(source.name, number, tuple(documents), digest.hexdigest(), size)
            documents, size, number = [], 0, number + 1
            digest = hashlib.sha256()
    if documents:
        yield Unit(source.name, number, tuple(documents), digest.hexdigest(), size)


def _recorded(folder: Path, unit: Unit) -> bool:
    """Whether the shard of `unit` is in place; raises `DataError` if its text has changed since."""
    path = record_path(folder, unit.file)
    if not path.exists():
        return False
    record = parse_section(ShardRecord, read_plain(path), str(path))
    if record.digest != unit.digest:
        raise DataError(f"source `{unit.source}` changed since `{folder}` was begun: delete the folder or use another")
    return shard_problem(folder, record.entry, checksum=False) is None


@contextmanager
def _pool(folder: Path, tokenizer: TextTokenizer, plan: Plan, workers: int) -> Iterator[Callable[[Unit], None]]:
    """Yields submit(unit), which blocks while enough units wait; all are done when the context ends."""
    if workers == 1:
        yield lambda unit: write_shard(folder, unit, tokenizer, plan.max_length, plan.valid_permille)
        return
    waiting: set[Future[None]] = set()

    def submit(unit: Unit) -> None:
        nonlocal waiting
        waiting.add(pool.submit(_work, folder, unit, plan.max_length, plan.valid_permille))
        if len(waiting) >= workers * WAITING_UNITS_PER_WORKER:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()

    # Spawned, because the tokenizer that was just trained has left threads behind that a fork would not survive.
    context = multiprocessing.get_context("spawn")
    # A worker reads the tokenizer itself: handed over, it would fill the pipe on which a worker is started, and Python
    # waits for ever for one that dies before it has emptied that.
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(folder,))
    try:
        yield submit
        for future in waiting:
            future.result()
    except BrokenProcessPool:
        raise DataError("a worker process died (out of memory?): run the same command again to continue") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(folder: Path) -> None:
    global _tokenizer_of_process
    _tokenizer_of_process = TextTokenizer.from_path(folder)
    # One worker, one core; the parallelism is in the number of workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A worker whose parent was killed would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _work(folder: Path, unit: Unit, max_length: int, valid_permille: int) -> None:
    assert _tokenizer_of_process is not None
    write_shard(folder, unit, _tokenizer_of_process, max_length, valid_permille)

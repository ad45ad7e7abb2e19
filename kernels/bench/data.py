"""How fast text becomes shards, and shards become batches, on one core."""

import pickle
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from harness import Row, require
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.data.dataset import ShardDataset
from pretrain.data.plan import BatchSize
from pretrain.data.prepare import prepare
from pretrain.data.sources.stdlib_docs import stdlib_docstrings, stdlib_topics
from pretrain.data.stream import SampleStream, ShardCorpus, Window
from pretrain.data.text import clean, sentences
from pretrain.objectives import build

# Target tokens a second that one H200 can use up with a model of BART-base's size.
EATEN = 240_000
LENGTH, MICRO_TOKENS, VOCABULARY = 512, 16_384, 8192
WINDOWS, COMPARED = 120, 3
MEGABYTE = 10**6
# Documents of about this many characters fill samples of LENGTH tokens.
DOCUMENT_CHARACTERS = 6000


def rows() -> list[Row]:
    """`prepare`, from text with a finished tokenizer to shards, and `loader`, from those shards to batches."""
    with tempfile.TemporaryDirectory() as place:
        folder, text = Path(place), Path(place) / "text.txt"
        text.write_text("\n\n".join(_documents()), encoding="utf-8")
        source = f"docs=text:{text}"
        first = prepare(folder / "first", [source], train_vocab=VOCABULARY, max_length=LENGTH)
        started, used = time.perf_counter(), time.process_time()
        again = prepare(folder / "again", [source], tokenizer=str(folder / "first"), max_length=LENGTH)
        seconds, busy = time.perf_counter() - started, time.process_time() - used
        dataset = ShardDataset(folder / "again")
        require(first.index_sha256 == again.index_sha256, "both times the same samples must come out")
        checked = _check_tokens(dataset, text)
        megabytes = text.stat().st_size / MEGABYTE
        detail = f"MB of text a second and core: {megabytes:.1f} MB in {seconds:.1f} s on {busy / seconds:.2f} cores"
        made = Row("prepare", megabytes / busy, None, "report", f"{detail}; {checked}")
        return [made, _loader(dataset)]


def _loader(dataset: ShardDataset) -> Row:
    """Tokens a second that one worker reads, corrupts and collates for `janus`, over what a GPU uses up."""
    alone, served = _stream(dataset, workers=0), _stream(dataset, workers=1)
    with closing(alone.windows(0, 0, 1)) as plain, closing(served.windows(0, 0, 1)) as worked:
        for _ in range(COMPARED):
            one, other = next(plain), next(worked)
            require(_bytes(one) == _bytes(other), "a worker's batches must be those made without one")
            _check_targets(one, served, dataset)
        started = time.perf_counter()
        tokens = sum(batch.n_tokens for _ in range(WINDOWS) for batch in next(worked).batches)
        speed = tokens / (time.perf_counter() - started)
    mean = np.mean(dataset.lengths) + 2
    detail = f"{speed / MEGABYTE:.2f} M target tokens/s of one worker / {EATEN:,}; samples of {mean:.0f} tokens"
    return Row("loader", speed / EATEN, 3.0, "min", f"{detail}, the same batches without a worker")


def _stream(dataset: ShardDataset, workers: int) -> SampleStream:
    tokenizer = dataset.tokenizer
    ids = tokenizer.ids
    objective = build({"name": "janus"}, ids, tokenizer.word_starts, ModelConfig())
    batch = BatchSize(samples=None, tokens=MICRO_TOKENS, micro_max_tokens=MICRO_TOKENS)
    return SampleStream(ShardCorpus(dataset, "train"), objective, seed=1, batch=batch, workers=workers)


def _check_targets(window: Window, stream: SampleStream, dataset: ShardDataset) -> None:
    """Refuses unless the targets of a window are the texts that its plan names, between BOS and EOS."""
    plan, ids = stream.plan_step(window.first, 1), list(dataset.sources("train").values())
    tokenizer = dataset.tokenizer
    wanted = [
        [tokenizer.bos, *dataset.tokens(int(ids[source][index])).tolist(), tokenizer.eos]
        for source, index in (plan.samples[at - plan.first] for micro in plan.micro[0] for at in micro)
    ]
    batches: list[Any] = window.batches
    found = [part.tolist() for batch in batches for part in batch.target_T.split(list(batch.n_target))]
    require(found == wanted, "the targets must be the texts of the shards")


def _check_tokens(dataset: ShardDataset, text: Path) -> str:
    """Refuses unless the shards hold the sentences of the text, encoded one by one, in order and without loss."""
    wanted = []
    for document in text.read_text(encoding="utf-8").split("\n\n"):
        parts = list(sentences(clean(document)))
        wanted += [dataset.tokenizer.encode(part if at == 0 else f" {part}") for at, part in enumerate(parts)]
    found = np.concatenate([dataset.tokens(sample) for sample in range(len(dataset))])
    require(np.array_equal(found, np.concatenate(wanted)), "the shards must hold the tokens of the text")
    return f"all {len(found):,} tokens as encoded sentence by sentence"


def _bytes(window: Window) -> list[bytes]:
    """Every tensor of a window, as one value that can be compared."""
    return [pickle.dumps([(k, v.numpy()) for k, v in vars(b).items() if isinstance(v, Tensor)]) for b in window.batches]


def _documents() -> Iterator[str]:
    """Python's own documentation as documents of about DOCUMENT_CHARACTERS, without blank lines inside."""
    waiting: list[str] = []
    for _, text in (*stdlib_docstrings(), *stdlib_topics()):
        waiting += [line for line in text.splitlines() if line.strip()]
        if sum(map(len, waiting)) >= DOCUMENT_CHARACTERS:
            yield "\n".join(waiting)
            waiting = []
    yield "\n".join(waiting)

"""What training reads: windows of packed micro-batches from any position on, the same for every world and worker count.

A sample draws its corruption from a generator keyed by (seed, global position), so neither the worker nor the
rank that happens to build it leaves a trace, and a second epoch draws anew.
"""

import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.data.dataset import ShardDataset, Split
from pretrain.data.order import BlendedOrder
from pretrain.data.plan import BatchSize, Corpus, StepPlan, plan_step
from pretrain.errors import DataError, ParlanceError
from pretrain.objectives.base import Example, Objective, Packed

# Validation and previews are the same in every run, whatever its seed; seeds of runs are below 2**31.
FIXED_SEED = 1 << 63
PREFETCH = 4

# (position, source, index) of the samples of one micro-batch.
Item = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Window:
    """The part of one update that this rank computes. Progress after it is `first + count`."""

    first: int
    count: int
    batches: list[Packed]


class ShardCorpus:
    """A split of a data folder, its samples corrupted by the objective. names: of the sources."""

    def __init__(self, dataset: ShardDataset, split: Split) -> None:
        self.dataset = dataset
        sources = dataset.sources(split)
        self.names = list(sources)
        self.sizes = [len(ids) for ids in sources.values()]
        self._ids = list(sources.values())
        self.longest = max((int(dataset.lengths[ids].max()) + 2 for ids in self._ids if len(ids)), default=0)

    def length(self, source: int, index: int) -> int:
        """Target tokens of a sample, with BOS and EOS."""
        return int(self.dataset.lengths[self._ids[source][index]]) + 2

    def example(self, source: int, index: int, rng: np.random.Generator, objective: Objective) -> Example:
        """The sample after `objective.corrupt`."""
        number = int(self._ids[source][index])
        return objective.corrupt(self.dataset.tokens(number), self.dataset.sentences(number), rng)


class SampleStream:
    """Micro-batches of a corpus for training, validation and previews."""

    def __init__(
        self,
        corpus: Corpus,
        objective: Objective,
        *,
        seed: int,
        batch: BatchSize,
        valid: Corpus | None = None,
        weights: Sequence[float] | None = None,
        workers: int = 0,
    ) -> None:
        """
        Args:
            corpus: what is trained on; valid: what is validated on.
            batch: the global batch of one update and the limit of a micro-batch.
            weights: blend of the sources of `corpus`, one number each; None: in proportion to their size.
            workers: processes that corrupt and collate ahead of training; 0 does it in this process.

        Raises:
            DataError: no samples. ConfigError: bad weights, or a sample longer than a micro-batch.
        """
        self.corpus, self.objective, self.seed, self.batch, self.workers = corpus, objective, seed, batch, workers
        self.order = BlendedOrder(corpus.sizes, weights, seed)
        self.valid = valid if valid is not None and any(valid.sizes) else None
        batch.check(max(corpus.longest, self.valid.longest if self.valid else 0))

    def epoch(self, position: int) -> float:
        """Passes over the training data before `position`."""
        return self.order.epoch(position)

    def plan_step(self, position: int, world: int) -> StepPlan:
        """The update that begins at `position`; equal on every rank."""
        return plan_step(self.order, self.corpus, position, world, self.batch)

    def windows(self, position: int, rank: int, world: int) -> Generator[Window, None, None]:
        """The windows of this rank from `position` on, without end; workers live until the iterator is closed.

        Raises:
            DataError: fewer samples than ranks, or a broken shard, in the window that needs it.
        """
        if self.order.samples < world:
            raise DataError(
                f"the training split must have a sample for each of {world} ranks, got {self.order.samples}"
            )
        return self._windows(position, rank, world)

    def _windows(self, position: int, rank: int, world: int) -> Generator[Window, None, None]:
        plans: deque[StepPlan] = deque()

        def items() -> Iterator[Item]:
            first = position
            while True:
                plan = self.plan_step(first, world)
                plans.append(plan)
                first += plan.count
                for micro in plan.micro[rank]:
                    yield [(at, *plan.samples[at - plan.first]) for at in micro]

        loader: DataLoader[Any] = DataLoader(
            _MicroBatches(self.corpus, self.objective, self.seed),
            batch_size=None,
            sampler=_Endless(items),
            num_workers=self.workers,
            collate_fn=_in_one_piece if self.workers else _as_it_is,
            prefetch_factor=PREFETCH if self.workers else None,
            multiprocessing_context="fork" if self.workers else None,
            worker_init_fn=_start_worker,
        )
        batches = iter(loader)
        try:
            while True:
                built = [_received(next(batches))]
                plan = plans.popleft()
                built += [_received(next(batches)) for _ in plan.micro[rank][1:]]
                yield Window(plan.first, plan.count, built)
        finally:
            # Workers end with the last reference. A traceback keeps this frame, so it must not keep them.
            del batches

    def fixed_batches(self, count: int, rank: int = 0, world: int = 1) -> list[Packed]:
        """This rank's share of `count` micro-batches of the validation split, the same in every call and run.

        The set does not depend on `world`; every rank gets equally many, some may be empty.

        Raises:
            DataError: there is no validation split.
        """
        if self.valid is None:
            raise DataError("the validation split is empty: prepare with a larger valid_permille or more text")
        order = BlendedOrder(self.valid.sizes, None, FIXED_SEED)
        items: list[Item] = [[]]
        load = 0
        for position in range(sum(self.valid.sizes)):
            source, index = order.locate(position)
            length = self.valid.length(source, index)
            if load + length > self.batch.micro_max_tokens:
                if len(items) == count:
                    break
                items.append([])
                load = 0
            items[-1].append((position, source, index))
            load += length
        items += [[]] * (-len(items) % world)
        build = _MicroBatches(self.valid, self.objective, FIXED_SEED)
        return [_checked(build[item]) for item in items[rank::world]]

    def preview(self, count: int) -> Packed:
        """`count` samples of the validation split (of the training split where there is none) as one batch."""
        corpus = self.valid or self.corpus
        order = BlendedOrder(corpus.sizes, None, FIXED_SEED)
        items = [(position, *order.locate(position)) for position in range(min(count, sum(corpus.sizes)))]
        return _checked(_MicroBatches(corpus, self.objective, FIXED_SEED)[items])


class _MicroBatches(Dataset[Any]):
    """Builds a micro-batch from its item; returns the error instead of raising, to keep its type and its one line."""

    def __init__(self, corpus: Corpus, objective: Objective, seed: int) -> None:
        self.corpus, self.objective, self.seed = corpus, objective, seed

    def __getitem__(self, item: Item) -> Packed | ParlanceError:
        try:
            examples = [
                self.corpus.example(source, index, sample_rng(self.seed, position), self.objective)
                for position, source, index in item
            ]
            packed: Packed = self.objective.collate(examples)
            return packed
        except ParlanceError as error:
            return error


class _Endless:
    """A sampler from a function; DataLoader wants something it can iterate again."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items())


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The generator of the sample at a global position."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))


def _checked(built: Packed | ParlanceError) -> Packed:
    if isinstance(built, ParlanceError):
        raise built
    return built


def _as_it_is(built: Any) -> Any:
    return built


def _in_one_piece(built: Any) -> Tensor:
    """What a worker made, as bytes: every tensor that crosses by itself costs a file descriptor and 1.5 ms."""
    return torch.frombuffer(bytearray(pickle.dumps(built, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _received(built: Packed | ParlanceError | Tensor) -> Packed:
    return _checked(pickle.loads(built.numpy().data) if isinstance(built, Tensor) else built)


def _start_worker(_: int) -> None:
    # A stop signal for the whole process group is for the ranks: they finish the step, for which they need the data.
    # (DataLoader has set torch to one thread here.)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_rank_says, daemon=True).start()


def _end_when_the_rank_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

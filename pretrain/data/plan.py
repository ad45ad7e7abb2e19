"""One update as a plan: which samples, on which rank, in which micro-batch.

A plan follows from lengths alone, so every rank computes the same one and nothing is communicated. The set of samples
of an update does not depend on the number of ranks.
"""

import heapq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pretrain.data.order import BlendedOrder
from pretrain.errors import ConfigError
from pretrain.objectives.base import Example

LOCATE_AT_ONCE = 1024


class Corpus(Protocol):
    """Samples of one split, by source and index.

    sizes: samples of each source. longest: the largest `length` of all. length: target tokens of a sample, BOS
    and EOS counted. example: the corrupted sample; a pure function of its arguments, runs in a worker.
    """

    sizes: list[int]
    longest: int

    def length(self, source: int, index: int) -> int: ...

    def example(self, source: int, index: int, rng: np.random.Generator, objective: Any) -> Example: ...


@dataclass(frozen=True)
class BatchSize:
    """Global batch: `samples`, or as many samples as fit into `tokens`; `micro_max_tokens` in one micro-batch.

    Exactly one of `samples` and `tokens` is given, which `BatchConfig` has checked.
    """

    samples: int | None
    tokens: int | None
    micro_max_tokens: int

    def check(self, longest: int) -> None:
        """Raises `ConfigError` where a sample of `longest` tokens would not fit."""
        for name, limit in (("micro_max_tokens", self.micro_max_tokens), ("tokens", self.tokens)):
            if limit is not None and limit < longest:
                raise ConfigError(f"`batch.{name}` must be at least the longest sample, {longest} tokens, got {limit}")


@dataclass(frozen=True)
class StepPlan:
    """Positions `first` to `first + count` as micro-batches.

    micro[rank][m]: positions of micro-batch m, increasing; every rank has the same number of micro-batches, some
    may be empty. samples: (source, index) of each position. tokens: target tokens of all.
    """

    first: int
    count: int
    tokens: int
    micro: list[list[list[int]]]
    samples: list[tuple[int, int]]


def plan_step(order: BlendedOrder, corpus: Corpus, position: int, world: int, batch: BatchSize) -> StepPlan:
    """Plans the update that begins at `position` for `world` ranks.

    Samples go, longest first, to the rank with the fewest tokens; then, on each rank, in the same way to the
    smallest number of micro-batches that is enough on every rank.
    """
    samples, lengths = _take(order, corpus, position, batch)
    longest_first = sorted(range(len(samples)), key=lambda at: (-lengths[at], at))
    ranks = _spread(longest_first, lengths, world, limit=None)
    assert ranks is not None
    needed = max(-(-sum(lengths[at] for at in rank) // batch.micro_max_tokens) for rank in ranks)
    for micros in range(max(needed, 1), len(samples) + 1):
        spread = [_spread(rank, lengths, micros, batch.micro_max_tokens) for rank in ranks]
        if all(part is not None for part in spread):
            break
    micro = [[sorted(position + at for at in one) for one in part] for part in spread if part is not None]
    return StepPlan(position, len(samples), sum(lengths), micro, samples)


def _take(
    order: BlendedOrder, corpus: Corpus, position: int, batch: BatchSize
) -> tuple[list[tuple[int, int]], list[int]]:
    """The samples of an update and their lengths."""
    samples: list[tuple[int, int]] = []
    lengths: list[int] = []
    total = 0
    while batch.samples is None or len(samples) < batch.samples:
        wanted = LOCATE_AT_ONCE if batch.samples is None else batch.samples - len(samples)
        sources, indices = order.locate_many(position + len(samples), min(wanted, LOCATE_AT_ONCE))
        for source, index in zip(sources.tolist(), indices.tolist(), strict=True):
            length = corpus.length(source, index)
            if batch.tokens is not None and total + length > batch.tokens:
                return samples, lengths
            samples.append((source, index))
            lengths.append(length)
            total += length
    return samples, lengths


def _spread(longest_first: list[int], lengths: list[int], bins: int, limit: int | None) -> list[list[int]] | None:
    """Each item to the bin with the least load; None where a bin would exceed `limit`."""
    loads = [(0, number) for number in range(bins)]
    out: list[list[int]] = [[] for _ in range(bins)]
    for at in longest_first:
        load, number = heapq.heappop(loads)
        if limit is not None and load + lengths[at] > limit:
            return None
        out[number].append(at)
        heapq.heappush(loads, (load + lengths[at], number))
    return out

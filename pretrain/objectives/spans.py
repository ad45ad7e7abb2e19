"""Which tokens a corruption hides. Every sampler is a pure function of its arguments and the generator it is given."""

from typing import NamedTuple

import numpy as np

POISSON_FLOOR = 1e-7  # the released code cuts its Poisson tables where the probability falls below this


class Spans(NamedTuple):
    """starts, lengths: int64, in increasing order of start; zero lengths are insertion points."""

    starts: np.ndarray
    lengths: np.ndarray

    def indices(self) -> np.ndarray:
        """Sorted positions inside the spans."""
        within = np.arange(int(self.lengths.sum())) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        return np.unique(np.repeat(self.starts, self.lengths) + within)


def poisson_lengths(budget: int, mean: float, rng: np.random.Generator) -> np.ndarray:
    """Poisson lengths, zeros included, that add up to exactly `budget` (the last one is trimmed)."""
    if budget <= 0:
        return np.empty(0, np.int64)
    drawn: list[np.ndarray] = []
    total = 0
    while total < budget:
        more = rng.poisson(mean, size=max(8, int(1.3 * (budget - total) / mean)))
        drawn.append(more)
        total += int(more.sum())
    lengths = np.concatenate(drawn)
    ends = np.cumsum(lengths)
    last = int(np.searchsorted(ends, budget))
    lengths = lengths[: last + 1].copy()
    lengths[last] -= int(ends[last]) - budget
    return lengths


def disjoint_spans(n: int, ratio: float, mean: float, rng: np.random.Generator) -> Spans:
    """Spans that hide exactly round(ratio * n) of n positions without overlap.

    The rest is spread over the gaps at random on a ring that is then cut anywhere, so that every position is
    hidden equally often; a span across the cut becomes two.
    """
    budget = min(n, round(ratio * n))
    lengths = poisson_lengths(budget, mean, rng)
    free, count = n - budget, len(lengths)
    slots = np.sort(rng.permutation(free + count)[:count])
    starts = slots - np.arange(count) + np.cumsum(lengths) - lengths
    starts = (starts + rng.integers(n)) % n if n else starts
    beyond = np.maximum(starts + lengths - n, 0)
    cut = beyond > 0
    starts, lengths = np.append(starts, np.zeros(cut.sum(), np.int64)), np.append(lengths - beyond, beyond[cut])
    order = np.argsort(starts, kind="stable")
    return Spans(starts[order], lengths[order])


def released_spans(n: int, ratio: float, mean: float, rng: np.random.Generator) -> Spans:
    """The released sampler: starts without replacement, overlaps allowed, a span past the end cut to one position.

    Overlaps make it hide less than `ratio`: 0.56 to 0.60 of the content for ratio 0.7 (JANUS, released data set).
    """
    lengths = poisson_lengths(min(n, int(np.ceil(ratio * n))), mean, rng)
    lengths = lengths[:n]
    starts = rng.permutation(n)[: len(lengths)]
    lengths = np.where(starts + lengths > n, np.minimum(lengths, 1), lengths)
    order = np.argsort(starts, kind="stable")
    return Spans(starts[order], lengths[order])


def uniform_mask(n: int, rng: np.random.Generator) -> np.ndarray:
    """CMLM's policy: k = floor(u * n) + 1 of n positions, u uniform on [0, 1); sorted."""
    k = min(n, int(rng.random() * n) + 1)
    return np.sort(rng.permutation(n)[:k])


def span_mask(n: int, ratio: float, mean: float, rng: np.random.Generator) -> np.ndarray:
    """Masked positions of a target of n tokens by the released NMT sampler; first and last are never masked."""
    masked = released_spans(n, ratio, mean, rng).indices()
    return masked[(masked > 0) & (masked < n - 1)]


def infill(tokens: np.ndarray, spans: Spans, mask_id: int) -> np.ndarray:
    """Text infilling: every span of `tokens` collapses to one mask; zero-length spans insert one."""
    pieces: list[np.ndarray] = []
    mask = np.array([mask_id], dtype=tokens.dtype)
    done = 0
    for start, length in zip(spans.starts.tolist(), spans.lengths.tolist(), strict=True):
        if start < done:  # overlapping spans of the released sampler melt into one
            done = max(done, start + length)
            continue
        pieces += [tokens[done:start], mask]
        done = start + length
    return np.concatenate([*pieces, tokens[done:]])


def in_words(spans: Spans, word_start: np.ndarray) -> Spans:
    """Spans over words turned into spans over tokens; `word_start` is bool per token, its first entry True."""
    edges = np.append(np.flatnonzero(word_start), len(word_start))
    starts = edges[spans.starts]
    return Spans(starts, edges[np.minimum(spans.starts + spans.lengths, len(edges) - 1)] - starts)

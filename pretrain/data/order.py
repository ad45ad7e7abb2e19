"""The order of samples: a pure function (seed, position) -> (source, index), without a table of the whole.

Blend. Every source has an integer share; within a cycle of `sum(shares)` positions it is drawn exactly that often,
spread evenly: going through the sources, source s takes position t of what the earlier ones left wherever
floor(t * share / left) steps up. By default the share of a source is its size, so a cycle is an epoch that has
every sample once. With weights, the d-th draw of a source is draw d mod size of its epoch d // size.

Block shuffle. A source is cut into blocks of consecutive samples. In each epoch the blocks are permuted, and samples
are shuffled inside groups of `GROUP_BLOCKS` successive permuted blocks: reads stay nearly sequential. Permutations
are arg-sorts of splitmix64 hashes, so they are the same on every machine and numpy version.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from pretrain.errors import ConfigError, DataError

BLOCK = 256
GROUP_BLOCKS = 32
# Given weights are rounded to this many shares; positions times shares must stay below 2**63.
WEIGHT_SHARES = 1 << 30
LARGEST_TOTAL = 1 << 31
MASK64 = (1 << 64) - 1


class BlendedOrder:
    """Order over several sources. Picklable; equal arguments give the equal order everywhere."""

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None,
        seed: int,
        block: int = BLOCK,
        shuffle: bool = True,
    ) -> None:
        """
        Args:
            sizes: samples of each source. weights: how often each is drawn, relative; None: in proportion to size.
            seed: of the permutations. block: samples of a block. shuffle: False keeps each source's own order.

        Raises:
            ConfigError: weights that are negative, not finite, all zero, of another number, or above 0 for an
                empty source.
            DataError: no samples at all, or too many.
        """
        self.sizes, self.seed, self.block, self.shuffle = tuple(sizes), seed, block, shuffle
        self.weights = None if weights is None else tuple(weights)
        if not 0 < sum(sizes) < LARGEST_TOTAL:
            raise DataError(f"the sources must have from 1 to {LARGEST_TOTAL - 1} samples, they have {sum(sizes)}")
        self.shares = self.sizes if weights is None else apportion(weights, self.sizes)
        # The largest source first: fewer positions have to look past it.
        self._by_share = sorted((s for s, share in enumerate(self.shares) if share), key=lambda s: -self.shares[s])
        self._cycle = sum(self.shares)
        # Two groups of every source: positions run on, and a plan may reach over the end of a group.
        self._group = functools.lru_cache(maxsize=2 * len(self.sizes))(self._make_group)
        self._starts = functools.lru_cache(maxsize=2 * len(self.sizes))(self._make_starts)

    def __reduce__(self) -> tuple[object, ...]:
        return BlendedOrder, (self.sizes, self.weights, self.seed, self.block, self.shuffle)

    @property
    def samples(self) -> int:
        """Samples of the sources that are drawn at all."""
        return sum(size for size, share in zip(self.sizes, self.shares, strict=True) if share)

    def epoch(self, position: int) -> float:
        """Passes over the data before `position`."""
        return position / self.samples

    def locate(self, position: int) -> tuple[int, int]:
        """(source, index within the source) at a position from 0 on."""
        source, index = self.locate_many(position, 1)
        return int(source[0]), int(index[0])

    def locate_many(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources int64 [count], indices int64 [count]) at positions `first` and following."""
        source, draw = self.draws(first, count)
        index = np.empty(count, np.int64)
        for s in np.unique(source):
            mine = source == s
            index[mine] = self._permuted(int(s), draw[mine])
        return source, index

    def draws(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many earlier positions drew the same source), each int64 [count]."""
        position = np.arange(first, first + count, dtype=np.int64)
        cycle, at = np.divmod(position, self._cycle)
        source, draw = np.empty(count, np.int64), np.empty(count, np.int64)
        open_ = np.arange(count)  # those that no source has taken yet
        left = self._cycle
        for s in self._by_share:
            share = self.shares[s]
            before = at * share // left
            taken = (at + 1) * share // left > before
            source[open_[taken]] = s
            draw[open_[taken]] = cycle[open_[taken]] * share + before[taken]
            open_, at, left = open_[~taken], (at - before)[~taken], left - share
        return source, draw

    def _permuted(self, source: int, draw: np.ndarray) -> np.ndarray:
        """Index within the source of each draw, int64 [k]; draws are increasing."""
        epoch, at = np.divmod(draw, self.sizes[source])
        if not self.shuffle:
            return at
        index = np.empty_like(at)
        for e in np.unique(epoch):
            starts = self._starts(source, int(e))[1]
            group = np.searchsorted(starts, at, side="right") - 1
            for g in np.unique(group[epoch == e]):
                mine = (epoch == e) & (group == g)
                index[mine] = self._group(source, int(e), int(g))[at[mine] - starts[g]]
        return index

    def _make_starts(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(blocks in permuted order, first draw of each group [groups]) of an epoch."""
        size = self.sizes[source]
        order = permutation(-(-size // self.block), key(self.seed, source, epoch))
        ends = np.cumsum(np.minimum((order + 1) * self.block, size) - order * self.block)
        return order, np.concatenate([[0], ends[GROUP_BLOCKS - 1 : -1 : GROUP_BLOCKS]])

    def _make_group(self, source: int, epoch: int, group: int) -> np.ndarray:
        """Samples of a group in the order they are drawn, int64."""
        blocks = self._starts(source, epoch)[0][group * GROUP_BLOCKS : (group + 1) * GROUP_BLOCKS]
        samples = (blocks[:, None] * self.block + np.arange(self.block)).ravel()
        samples = samples[samples < self.sizes[source]]
        return samples[permutation(len(samples), key(self.seed, source, epoch, group))]


def weights_by_name(names: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    """`weights` in the order of the sources; raises `ConfigError` for a name too many or too few."""
    for name in weights:
        if name not in names:
            raise ConfigError(f"`data.weights` names an unknown source `{name}`; sources: {', '.join(names)}")
    for name in names:
        if name not in weights:
            raise ConfigError(f"`data.weights` must name every source, it lacks `{name}` (0 leaves a source out)")
    return [weights[name] for name in names]


def apportion(weights: Sequence[float], sizes: Sequence[int]) -> tuple[int, ...]:
    """Integer shares of `WEIGHT_SHARES` in proportion to `weights`, by largest remainder; 0 stays 0.

    Raises `ConfigError` for weights that make no blend.
    """
    if len(weights) != len(sizes):
        raise ConfigError(f"`weights` must have one number for each of {len(sizes)} sources, got {len(weights)}")
    for number, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"`weights` must be numbers from 0 on, source {number} has {weight}")
        if weight > 0 and size == 0:
            raise ConfigError(f"`weights` must be 0 for an empty source, source {number} has {weight}")
    if not any(weights):
        raise ConfigError("`weights` must have at least one number above 0, all are 0")
    # Exact: every float is an integer ratio, and so is its share.
    ratios = [float(weight).as_integer_ratio() for weight in weights]
    common = math.lcm(*(denominator for _, denominator in ratios))
    units = [numerator * (common // denominator) for numerator, denominator in ratios]
    total = sum(units)
    shares = [unit * WEIGHT_SHARES // total for unit in units]
    remainders = [unit * WEIGHT_SHARES % total for unit in units]
    for number in sorted(range(len(units)), key=lambda n: (-remainders[n], n))[: WEIGHT_SHARES - sum(shares)]:
        shares[number] += 1
    return tuple(shares)


def key(*parts: int) -> int:
    """64-bit key of some integers."""
    state = 0x243F6A8885A308D3
    for part in parts:
        state = int(splitmix64(np.array([(state ^ part) & MASK64], np.uint64))[0])
    return state


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Vigna's splitmix64 finaliser of uint64 `x`, elementwise."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(n: int, keyed: int) -> np.ndarray:
    """Permutation of 0..n-1, int64 [n], that depends on `n` and the key alone."""
    hashes = splitmix64(splitmix64(np.arange(n, dtype=np.uint64)) ^ np.uint64(keyed))
    return np.argsort(hashes, kind="stable")

"""The order: every sample once per epoch, exact blends, the same from any position."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import GROUP_BLOCKS, BlendedOrder, permutation, weights_by_name
from pretrain.errors import ConfigError, DataError

SIZES = st.lists(st.integers(0, 400), min_size=1, max_size=5).filter(any)


def pairs(order: BlendedOrder, first: int, count: int) -> list[tuple[int, int]]:
    source, index = order.locate_many(first, count)
    return list(zip(source.tolist(), index.tolist(), strict=True))


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 2**31 - 1), st.integers(1, 7), st.booleans())
def test_every_epoch_has_every_sample_once(sizes: list[int], seed: int, block: int, shuffle: bool) -> None:
    order = BlendedOrder(sizes, None, seed, block, shuffle)
    every = [(source, index) for source, size in enumerate(sizes) for index in range(size)]
    for epoch in range(2):
        seen = pairs(order, epoch * len(every), len(every))
        assert sorted(seen) == every
    assert order.epoch(len(every)) == 1


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 3000), st.integers(1, 200), st.integers(1, 50))
def test_random_access_equals_running_through(sizes: list[int], first: int, count: int, block: int) -> None:
    order = BlendedOrder(sizes, None, 7, block)
    run = pairs(BlendedOrder(sizes, None, 7, block), 0, first + count)
    assert pairs(order, first, count) == run[first:]
    assert order.locate(first + count - 1) == run[-1]
    assert pickle.loads(pickle.dumps(order)).locate(first) == run[first]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6).filter(any), st.integers(0, 10**7))
def test_blend_is_exact_in_every_prefix(weights: list[float], first: int) -> None:
    order = BlendedOrder([5] * len(weights), weights, 3)
    for start in (0, first):
        source, draw = order.draws(start, 5000)
        for s, weight in enumerate(weights):
            mine = source == s
            assert np.array_equal(draw[mine], np.arange(mine.sum()) + (draw[mine][0] if mine.any() else 0))
            expected = np.arange(1, 5001) * (weight / sum(weights))
            assert np.abs(np.cumsum(mine) - expected).max() <= len(weights) + 1
            assert weight > 0 or not mine.any()


def test_sources_are_interleaved_evenly() -> None:
    source, _ = BlendedOrder([9000, 1000], None, 1).draws(0, 10_000)
    assert (source.reshape(-1, 10).sum(1) == 1).all()


def test_seed_and_epoch_change_the_order_and_blocks_keep_it_local() -> None:
    n, block = 256 * 100, 256
    one = np.array(pairs(BlendedOrder([n], None, 1), 0, 2 * n))[:, 1]
    assert not np.array_equal(one[:n], one[n:])
    assert not np.array_equal(one[:n], np.array(pairs(BlendedOrder([n], None, 2), 0, n))[:, 1])
    group = one[: GROUP_BLOCKS * block]
    assert len(np.unique(group // block)) == GROUP_BLOCKS
    assert abs(np.corrcoef(group[:-1], group[1:])[0, 1]) < 0.05


def test_order_is_pinned() -> None:
    """A change here silently changes what every resumed run reads."""
    assert permutation(8, 1).tolist() == [0, 6, 7, 4, 2, 5, 1, 3]
    pinned = [(1, 0), (0, 4), (0, 1), (1, 2), (0, 3), (0, 0), (1, 1), (0, 2), (0, 5)]
    assert pairs(BlendedOrder([6, 3], None, 5, block=2), 0, 9) == pinned


def test_thirty_million_samples_need_no_table() -> None:
    order = BlendedOrder([30_000_000, 1_000_000], [0.7, 0.3], 1)
    source, index = order.locate_many(25_000_000_000, 2048)
    assert (source == 0).sum() in range(1430, 1438) and index[source == 0].max() < 30_000_000
    assert order._group.cache_info().currsize <= 4


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0], "source 1 has -1.0"),
        ([float("nan"), 1.0], "source 0 has nan"),
        ([float("inf"), 1.0], "source 0 has inf"),
        ([0.0, 0.0], "all are 0"),
        ([1.0], "each of 2 sources, got 1"),
    ],
)
def test_bad_weights(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlendedOrder([3, 4], weights, 1)


def test_empty_sources_and_names() -> None:
    with pytest.raises(ConfigError, match="empty source, source 1"):
        BlendedOrder([3, 0], [1.0, 1.0], 1)
    with pytest.raises(DataError, match="they have 0"):
        BlendedOrder([0, 0], None, 1)
    assert weights_by_name(["a", "b"], {"b": 1, "a": 0}) == [0, 1]
    with pytest.raises(ConfigError, match="unknown source `c`"):
        weights_by_name(["a", "b"], {"a": 1, "b": 1, "c": 1})
    with pytest.raises(ConfigError, match="lacks `b`"):
        weights_by_name(["a", "b"], {"a": 1})

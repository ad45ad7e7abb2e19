"""row_interval.h says of every pair and tile what `SampleMask` says; philox.h draws what its authors draw."""

import ctypes

import numpy as np
import pytest

from parlance_kernels.sample_attention.mask import Segment, visible
from tests.kernels.cuda.emulation import host_library

EMPTY, PARTIAL, FULL = 0, 1, 2


def random_segment(random, steps):
    """A segment that `SampleMask` would take, with every edge: no prefix, no window, windows that touch, one row."""
    most = int(random.choice([1, 2, 9, 40, 150]))
    rows, prefix = int(random.integers(1, most + 1)), int(random.integers(0, most + 1))
    prefix_step, window_step = (int(random.choice(steps)) for _ in range(2))
    window_len = int(random.choice([0, 1, int(random.integers(1, most + 1))]))
    prefix = max(prefix, -(rows - 1) * prefix_step, 0 if window_len else 1 - min(0, (rows - 1) * prefix_step))
    # The window begins behind the prefix in the first and in the last row, so in all.
    ends = prefix, prefix + (rows - 1) * (prefix_step - window_step)
    gap = int(random.choice([0, 0, 1, int(random.integers(0, most))]))
    start = max(ends) + gap if window_len else int(random.integers(-5, 5))
    return Segment(0, rows, 0, prefix, prefix_step, start, window_step, window_len)


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def defined(segment):
    dense = visible(segment).numpy()
    return np.pad(dense, ((0, 0), (0, 3)))  # keys behind the last that is read


def test_ten_million_pairs():
    library, random, pairs = host_library(), np.random.default_rng(0), 0
    while pairs < 10_000_000:
        segment = random_segment(random, [-2, -1, 0, 0, 1, 1, 1, 3])
        expected = defined(segment)
        found = np.full(expected.shape, 7, np.uint8)
        library.check_reads(pointer(np.array(segment, np.int32)), ctypes.c_int64(expected.shape[1]), pointer(found))
        assert np.array_equal(found, expected), segment
        pairs += expected.size


def tiles_of(segment, expected, height, width):
    """Class and number of walks of each tile, and how many pairs of it there are and are read."""
    tall, wide = -(-expected.shape[0] // height), -(-expected.shape[1] // width)
    kinds, walked = np.full((tall, wide), 7, np.uint8), np.zeros((tall, wide), np.uint8)
    sizes = [ctypes.c_int64(n) for n in (expected.shape[1], height, width)]
    host_library().check_tiles(pointer(np.array(segment, np.int32)), *sizes, pointer(kinds), pointer(walked))
    edges = np.arange(0, expected.shape[0], height), np.arange(0, expected.shape[1], width)
    totals = [
        np.add.reduceat(np.add.reduceat(x.astype(np.int64), edges[0], axis=0), edges[1], axis=1)
        for x in (expected, np.ones_like(expected))
    ]
    return kinds, walked, *totals


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (32, 8), (5, 7), (1, 1)])
def test_tiles_are_never_unsafe(shape):
    random = np.random.default_rng(shape[0])
    for _ in range(300):
        segment = random_segment(random, [-2, -1, 0, 0, 1, 1, 1, 3])
        kinds, walked, read, pairs = tiles_of(segment, defined(segment), *shape)
        assert not read[kinds == EMPTY].any(), segment
        assert (read == pairs)[kinds == FULL].all(), segment
        assert (kinds <= FULL).all()
        assert (walked[read > 0] == 1).all(), segment
        assert (walked <= 1).all(), segment


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (5, 7)])
def test_tiles_are_exact_where_steps_are_0_or_1(shape):
    random = np.random.default_rng(shape[1])
    seen = set()
    for _ in range(300):
        segment = random_segment(random, [0, 1])
        kinds, walked, read, pairs = tiles_of(segment, defined(segment), *shape)
        exact = np.where(read == 0, EMPTY, np.where(read == pairs, FULL, PARTIAL))
        assert np.array_equal(kinds, exact), segment
        assert np.array_equal(walked, (read > 0)), segment
        seen |= set(np.unique(kinds).tolist())
    assert seen == {EMPTY, PARTIAL, FULL}


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [  # kat_vectors of Random123
        (0, [0] * 4, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, [2**32 - 1] * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x299F31D0A4093822, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(seed, counter, expected):
    words = np.array(counter, np.uint32)
    host_library().check_philox(ctypes.c_uint64(seed), pointer(words))
    assert " ".join(f"{word:08x}" for word in words) == expected

"""What each block of the CUDA kernels does: rows and keys of a SampleMask cut into work, as one int32 tensor.

* A row tile is 64 rows of one segment; its block walks the keys that these rows read.
* A short sample has at most 192 keys, which stay in shared memory for up to 16 strips of 16 rows of its segments.
* A key tile is up to 64 keys that no other sample's first key cuts; its block walks the rows of the segments that read
  any of it, in the order of the table.

So every sum has one order, which does not depend on what else is in the batch. Rows are in a row tile or in a strip.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parlance_kernels.sample_attention.mask import SampleMask

TILE, STRIP = 64, 16  # as in kernels/csrc/attention.h
SHORT_KEYS, SHORT_WIDTH = 192, 64  # JANUS's NAR and AUX keys at 128 tokens; three blocks of this on an H200
STRIPS = 16  # of a block: four for each warp


class Plan(NamedTuple):
    """words: int32, the tables of `parts` one behind the other; sizes: lines of each but the last; room: keys that the
    largest short sample needs, a multiple of 16."""

    words: Tensor
    sizes: list[int]
    room: int


def plan(mask: SampleMask, device: torch.device, width: int) -> Plan:
    """The plan of `mask` on `device`, made once and kept with the mask; to a GPU it is copied without waiting.

    width: of a head; wide ones have no short samples, shared memory would hold too few blocks.
    """
    most_keys = SHORT_KEYS if width <= SHORT_WIDTH else 0
    if (device, most_keys) not in mask.kept:
        is_short = _is_short(mask, most_keys)
        short, strips = _short_samples(mask, is_short)
        key_tiles, readers = _key_tiles(mask)
        tables = mask.table, _row_tiles(mask, ~is_short), short, strips, key_tiles, readers
        words = torch.from_numpy(np.concatenate([x.ravel().astype(np.int32) for x in tables]))
        if device.type == "cuda":
            words = words.pin_memory().to(device, non_blocking=True)
        room = -(-int(short[:, 1].max(initial=0)) // STRIP) * STRIP
        mask.kept[device, most_keys] = Plan(words, [len(x) for x in tables[:-1]], room)
    found = mask.kept[device, most_keys]
    assert isinstance(found, Plan)
    return found


def parts(words: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Segments [S, 8], row tiles [N, 2], short samples [M, 4], strips [P, 2], key tiles [L, 4] and readers, each flat.

    A row tile or strip is (segment, first row); a short sample (first key of the buffer, keys, first strip, end of
    strips); a key tile (first key of the buffer, keys, first reader, end of readers); a reader is a segment.
    """
    lengths = [size * width for size, width in zip(sizes, (8, 2, 4, 2, 4), strict=True)]
    return words.split([*lengths, words.shape[0] - sum(lengths)])


def _is_short(mask: SampleMask, most_keys: int) -> np.ndarray:
    """bool [S]: segments of samples whose keys fit, and have none among them that no row reads."""
    key_start = mask.table[:, 2]
    _, sample = np.unique(key_start, return_inverse=True)
    prefix_end, window_first, end = _bounds(mask)
    keys, prefix = (np.zeros(len(mask), np.int64) for _ in range(2))
    np.maximum.at(keys, sample, end)
    np.maximum.at(prefix, sample, prefix_end)
    fits = (keys <= most_keys)[sample] & (window_first <= prefix[sample])
    everybody = np.ones(len(mask), bool)
    np.logical_and.at(everybody, sample, fits)
    return everybody[sample]


def _bounds(mask: SampleMask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each segment's rows together: end of the longest prefix, beginning of the first window, end of all keys."""
    _, rows, _, prefix, prefix_step, window_start, window_step, window_len = mask.table.astype(np.int64).T
    last = np.stack([np.zeros_like(rows), rows - 1])
    prefix_end = (prefix + last * prefix_step).max(axis=0)
    window = window_start + last * window_step
    has_window = window_len > 0
    window_end = np.where(has_window, window.max(axis=0) + window_len, 0)
    return prefix_end, np.where(has_window, window.min(axis=0), 0), np.maximum(prefix_end, window_end)


def _short_samples(mask: SampleMask, is_short: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[M, 4], those with most work first, and their strips [P, 2]; a sample with many strips has several lines."""
    segments = np.flatnonzero(is_short)
    key_start, end = mask.table[segments, 2], _bounds(mask)[2][segments]
    segments = segments[np.argsort(key_start, kind="stable")]
    which, nth = _repeat(-(-mask.table[segments, 1].astype(np.int64) // STRIP))
    strips = np.stack([segments[which], nth * STRIP], axis=1)
    samples, of_sample = np.unique(mask.table[strips[:, 0], 2], return_counts=True)
    keys = np.zeros(len(samples), np.int64)
    np.maximum.at(keys, np.searchsorted(samples, key_start), end)
    block, nth = _repeat(-(-of_sample // STRIPS))
    first = (np.cumsum(of_sample) - of_sample)[block] + nth * STRIPS
    stop = np.minimum(first + STRIPS, np.cumsum(of_sample)[block])
    table = np.stack([samples[block], keys[block], first, stop], axis=1)
    return table[np.argsort(-keys[block] * (stop - first), kind="stable")], strips


def _row_tiles(mask: SampleMask, is_long: np.ndarray) -> np.ndarray:
    """[N, 2], those that walk most key tiles first, so that none of them ends alone."""
    t = mask.table.astype(np.int64)
    count = np.where(is_long, -(-t[:, 1] // TILE), 0)
    segment, nth = _repeat(count)
    first = nth * TILE
    _, rows, _, prefix, prefix_step, window_start, window_step, window_len = t[segment].T
    bounds = np.stack([first, np.minimum(first + TILE, rows) - 1])
    prefix_end = (prefix + bounds * prefix_step).max(axis=0)
    window = (window_start + bounds * window_step).max(axis=0) + window_len
    window -= (window_start + bounds * window_step).min(axis=0)
    walked = -(-prefix_end // TILE) + np.where(window_len > 0, -(-window // TILE), 0)
    order = np.argsort(-walked, kind="stable")
    return np.stack([segment, first], axis=1)[order]


def _key_tiles(mask: SampleMask) -> tuple[np.ndarray, np.ndarray]:
    """[M, 4], those with most rows first, and the readers of each. They cover all keys, also those nobody reads."""
    t = mask.table.astype(np.int64)
    rows, key_start = t[:, 1], t[:, 2]
    cuts = np.unique(np.concatenate([[0, mask.n_keys], key_start]))
    block, nth = _repeat(-(-np.diff(cuts) // TILE))
    key = cuts[block] + nth * TILE
    keys = np.minimum(TILE, cuts[block + 1] - key)
    end = key_start + _bounds(mask)[2]
    first_tile = np.searchsorted(key, key_start)
    reader, nth = _repeat(np.maximum(np.searchsorted(key, end) - first_tile, 0))
    tile = first_tile[reader] + nth
    counts = np.bincount(tile, minlength=len(key))
    ends = np.cumsum(counts)
    order = np.argsort(-np.bincount(tile, weights=rows[reader], minlength=len(key)), kind="stable")
    table = np.stack([key, keys, ends - counts, ends], axis=1)[order]
    return table, reader[np.argsort(tile, kind="stable")]


def _repeat(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index i counts[i] times, for all i, and the number of each among its equals."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - (np.cumsum(counts) - counts)[index]

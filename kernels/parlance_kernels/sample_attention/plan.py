"""What each block of the CUDA kernels does: row tiles and key tiles of a SampleMask, as one int32 tensor.

A row tile is 64 rows of one segment; its block walks the keys that these rows read. A key tile is up to 64 keys that no
other sample's first key cuts; its block walks the rows of the segments that read any of it, in the order of the table.
So every sum has one order, which does not depend on what else is in the batch.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parlance_kernels.sample_attention.mask import SampleMask

TILE = 64  # as in kernels/csrc/attention.h


class Plan(NamedTuple):
    """words: int32, the tables of `parts` one behind the other; sizes: how many segments, row tiles and key tiles."""

    words: Tensor
    sizes: list[int]


def plan(mask: SampleMask, device: torch.device) -> Plan:
    """The plan of `mask` on `device`, made once and kept with the mask; to a GPU it is copied without waiting."""
    if device not in mask.kept:
        tables = _row_tiles(mask), *_key_tiles(mask)
        words = torch.from_numpy(np.concatenate([mask.table.ravel(), *(x.ravel().astype(np.int32) for x in tables)]))
        if device.type == "cuda":
            words = words.pin_memory().to(device, non_blocking=True)
        mask.kept[device] = Plan(words, [len(mask), len(tables[0]), len(tables[1])])
    found = mask.kept[device]
    assert isinstance(found, Plan)
    return found


def parts(words: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Segments [S, 8], row tiles (segment, first row) [N, 2], key tiles [M, 4] and readers, each flat.

    A key tile is (first key of the buffer, keys, first reader, end of readers); readers are segments.
    """
    segments, row_tiles, key_tiles = (size * width for size, width in zip(sizes, (8, 2, 4), strict=True))
    used = segments + row_tiles + key_tiles
    four = words.split([segments, row_tiles, key_tiles, words.shape[0] - used])
    return four[0], four[1], four[2], four[3]


def _row_tiles(mask: SampleMask) -> np.ndarray:
    """[N, 2], those that walk most key tiles first, so that none of them ends alone."""
    t = mask.table.astype(np.int64)
    count = -(-t[:, 1] // TILE)
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
    _, rows, key_start, prefix, prefix_step, window_start, window_step, window_len = t.T
    cuts = np.unique(np.concatenate([[0, mask.n_keys], key_start]))
    block, nth = _repeat(-(-np.diff(cuts) // TILE))
    key = cuts[block] + nth * TILE
    keys = np.minimum(TILE, cuts[block + 1] - key)
    bounds = np.stack([np.zeros_like(rows), rows - 1])
    window_end = np.where(window_len > 0, window_start + bounds * window_step + window_len, 0)
    end = key_start + np.maximum(prefix + bounds * prefix_step, window_end).max(axis=0)
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

"""A SampleMask as parts that attention libraries have kernels for, in one call for whole parts and one for causal ones.

    whole    n rows read m keys
    causal   row i of n reads the first m - n + i + 1 of m keys, m >= n (aligned at the last row and the last key)

* A prefix that does not grow is whole, one that grows by a key a row is causal.
* A window that stands is whole. One of L keys that moves on by a key a row is, over n <= L rows, two causal parts: row
  r reads r .. L - 1, which is causal when rows and keys are taken from the last to the first, and L .. L + r - 1, which
  is causal for the rows behind the first. Longer segments are cut every L rows.

The parts hold exactly the pairs of the mask, each once, and no row of a part is without keys, whose log-sum-exp is
-inf in one library and inf in the next. Whole parts with the same keys are one part.

Shapes: R rows, K keys, P rows of all parts, S parts.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parlance_kernels.sample_attention.mask import SampleMask, Segment

CALLS = 2  # whole, causal
CALL_NUMBERS = 5  # of a call in `Split.sizes`


class Call(NamedTuple):
    """One call: parts one behind the other. Row p of the call is row `rows_P[p]` of the buffer, and so with keys; empty
    where the call takes the whole buffer as it is. row_ends, key_ends: int32 [S + 1], where parts begin and end."""

    causal: bool
    rows_P: Tensor
    keys_P: Tensor
    row_ends: Tensor
    key_ends: Tensor
    most_rows: int
    most_keys: int


class Layer(NamedTuple):
    """Rows (or keys) of all calls, one behind the other: `places` among them, `targets` in the buffer, none twice."""

    targets: Tensor
    places: Tensor


class Split(NamedTuple):
    """words: int32, the tensors of `unpack` one behind the other; sizes: their lengths and the calls' largest parts."""

    words: Tensor
    sizes: list[int]


def split(mask: SampleMask, device: torch.device) -> Split:
    """The parts of `mask` on `device`, made once and kept with the mask; to a GPU they are copied without waiting.

    Raises:
        ValueError: a prefix or window of some segment moves by other steps than 0 and 1.
    """
    key = device, "parts"
    if key not in mask.kept:
        rows, keys, tables, sizes = [], [], [], []
        for causal, parts in enumerate(_parts(mask)):
            call_rows, call_keys, row_ends, key_ends = _call(parts, bool(causal))
            rows.append(call_rows)
            keys.append(call_keys)
            given = [_unless_all(call_rows, mask.n_rows), _unless_all(call_keys, mask.n_keys)]
            tables += [*given, row_ends, key_ends]
            most = (int(np.diff(ends).max(initial=0)) for ends in (row_ends, key_ends))
            sizes += [*map(len, given), len(row_ends), *most]
        for index, size in ((rows, mask.n_rows), (keys, mask.n_keys)):
            layers = _layers(np.concatenate(index), size)
            tables += [table for layer in layers for table in layer]
            sizes += [len(layers), *(len(targets) for targets, _ in layers)]
        words = torch.from_numpy(np.concatenate(tables).astype(np.int32))
        if device.type == "cuda":
            words = words.pin_memory().to(device, non_blocking=True)
        mask.kept[key] = Split(words, sizes)
    found = mask.kept[key]
    assert isinstance(found, Split)
    return found


def unpack(words: Tensor, sizes: list[int]) -> tuple[list[Call], list[Layer], list[Layer]]:
    """The calls that have parts, and the layers of their rows and of their keys; none where calls have the buffer's."""
    calls, at = [], 0

    def take(length: int) -> Tensor:
        nonlocal at
        at += length
        return words[at - length : at]

    for causal in range(CALLS):
        n_rows, n_keys, ends, *most = sizes[causal * CALL_NUMBERS : (causal + 1) * CALL_NUMBERS]
        call = Call(bool(causal), take(n_rows), take(n_keys), take(ends), take(ends), *most)
        if ends > 1:
            calls.append(call)
    layers, rest = [], sizes[CALLS * CALL_NUMBERS :]
    while rest:
        layers.append([Layer(take(length), take(length)) for length in rest[1 : rest[0] + 1]])
        rest = rest[rest[0] + 1 :]
    row_layers, key_layers = layers
    return calls, row_layers, key_layers


def _parts(mask: SampleMask) -> tuple[np.ndarray, np.ndarray]:
    """Whole and causal parts, in order of their rows: first row, rows, first key, keys, whether they run backwards."""
    t = mask.table.astype(np.int64)
    _, rows, _, _, prefix_step, _, window_step, window_len = t.T
    moves = rows > 1
    steps = np.stack([prefix_step * moves, window_step * moves * (window_len > 0)])
    if (odd := ((steps != 0) & (steps != 1)).any(axis=0)).any():
        raise ValueError(
            "the library's attention needs prefixes and windows that move by 0 or 1 keys a row, "
            f"got {Segment(*map(int, t[int(odd.argmax())]))}; the backends torch and cuda take any"
        )
    prefix, window = steps == 1
    whole = [_table(t[~prefix], 0, 1, 2, 3), _table(t[~window], 0, 1, 2, 7, 5)]
    causal = [_growing(t[prefix]), *_sliding(t[window])]
    return _sorted(whole), _sorted(causal)


def _table(t: np.ndarray, *columns: int) -> np.ndarray:
    """Whole parts from columns of segments: first row, rows, first key, keys, and what to add to the first key."""
    first_row, rows, first_key, keys, *more = (t[:, column] for column in columns)
    return np.stack([first_row, rows, first_key + sum(more), keys, np.zeros_like(rows)], axis=1)


def _growing(t: np.ndarray) -> np.ndarray:
    """Prefixes that grow; a row whose prefix is empty is left out."""
    first_row, rows, first_key, prefix = t[:, :4].T
    empty = (prefix == 0).astype(np.int64)
    return np.stack([first_row + empty, rows - empty, first_key, prefix + rows - 1, np.zeros_like(rows)], axis=1)


def _sliding(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows that move: keys from a row's own to the first row's last, backwards, and those behind."""
    _, all_rows, _, _, _, _, _, length = t.T
    cuts = -(-all_rows // length)
    which = np.repeat(np.arange(len(t)), cuts)
    skipped = (np.arange(len(which)) - (np.cumsum(cuts) - cuts)[which]) * length[which]
    first_row, all_rows, first_key, _, _, window, _, length = t[which].T
    rows = np.minimum(length, all_rows - skipped)
    first_row, first_key = first_row + skipped, first_key + window + skipped
    left = np.stack([first_row, rows, first_key, length, np.ones_like(rows)], axis=1)
    right = np.stack([first_row + 1, rows - 1, first_key + length, rows - 1, np.zeros_like(rows)], axis=1)
    return left, right


def _sorted(tables: list[np.ndarray]) -> np.ndarray:
    parts = np.concatenate(tables)
    parts = parts[(parts[:, 1] > 0) & (parts[:, 3] > 0)]
    return parts[np.argsort(parts[:, 0], kind="stable")]


def _call(parts: np.ndarray, causal: bool) -> tuple[np.ndarray, ...]:
    """Row and key of the buffer for each row and key of a call, and where its parts end."""
    if causal:
        leaders = np.arange(len(parts))
    else:  # parts with the same keys come one behind the other, and their keys once
        _, leaders, group = np.unique(parts[:, 2:4], axis=0, return_index=True, return_inverse=True)
        leader = leaders[group.reshape(-1)]
        parts = parts[np.argsort(leader, kind="stable")]
        leaders = np.flatnonzero(np.diff(np.sort(leader), prepend=-1))
    rows, keys = _runs(parts[:, [0, 1, 4]]), _runs(parts[leaders, 2:])
    of_part = np.add.reduceat(parts[:, 1], leaders) if len(parts) else parts[:, 1]
    return rows, keys, _ends(of_part), _ends(parts[leaders, 3])


def _runs(runs: np.ndarray) -> np.ndarray:
    """The numbers of runs (first, length, whether from the last to the first), one run behind the other."""
    first, length, backwards = runs.T
    which = np.repeat(np.arange(len(first)), length)
    nth = np.arange(len(which)) - (np.cumsum(length) - length)[which]
    return first[which] + np.where(backwards[which] > 0, length[which] - 1 - nth, nth)


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _unless_all(index: np.ndarray, size: int) -> np.ndarray:
    """`index`, or nothing where it is 0 .. size - 1."""
    return index[:0] if len(index) == size and (index == np.arange(size)).all() else index


def _layers(index: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(targets, places) with index[places] == targets: every number's first occurrence, the second, and so on."""
    if not len(_unless_all(index, size)):
        return []
    order = np.argsort(index, kind="stable")
    targets = index[order]
    begins = np.flatnonzero(np.diff(targets, prepend=-1))
    nth = np.arange(len(targets)) - np.repeat(begins, np.diff(begins, append=len(targets)))
    return [(targets[nth == n], order[nth == n]) for n in range(int(nth.max(initial=-1)) + 1)]

"""Rows that leave the decoder at a layer known before the forward, each in several copies with other layers.

A sample has k copies, which differ only in the layer at which each of their tokens leaves. A state that has left is
copied upward: the layers above read it, but compute it no more (ELMER, sections 4.1 and 4.2). Copies of a token are the
same numbers as long as they have read the same numbers, and are then computed once:

* the first layer reads embeddings, which have no copies yet;
* what leaves after it is what goes on, so the second layer reads the same rows in every copy, too. Only gradients could
  tell them apart: where copied states are detached, copies part after the first layer.

All of it is index arithmetic on the host. A state table holds each state once, those that left in front
(`parlance_kernels.exit_copy`).

Shapes: R rows of the input, P copies of all rows, U states of a table, A rows that a layer computes, K keys, N states
that leave, S that go on, M memory rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parlance_kernels import SampleMask
from pretrain.models.ids import SpecialIds
from pretrain.models.patterns import FirstRow, mask_rows
from pretrain.models.rows import LayerWork, to_device


class ExitSample(NamedTuple):
    """The decoder input of one sample. tokens, positions: int [n]. memory: (start, length) of its encoder rows.

    exits: int [k, n], the layer, from 1, at which each token of each copy leaves.
    """

    tokens: np.ndarray
    positions: np.ndarray
    memory: tuple[int, int]
    exits: np.ndarray

    @classmethod
    def masks(cls, exits: np.ndarray, memory: tuple[int, int], ids: SpecialIds, first_row: FirstRow) -> "ExitSample":
        """Rows that know nothing of the text, as `mask_rows` makes them."""
        n = exits.shape[1]
        return cls(mask_rows(n, ids, first_row), np.arange(n), memory, exits)


@dataclass(frozen=True)
class ExitLayer:
    """What one layer does with the table of states that it reads.

    states: rows of the table, of which the first `frozen` left in earlier layers. active_A: states that it computes.
    key_K: the states behind the keys of `self_mask`. Both are None where they are the whole table in order.
    left_N, stays_S: outputs that leave after it, and that go on.
    """

    states: int
    active_A: Tensor | None
    key_K: Tensor | None
    self_mask: SampleMask
    cross_mask: SampleMask
    frozen: int
    left_N: Tensor
    stays_S: Tensor


@dataclass(frozen=True)
class ExitRows:
    """Decoder input with early exits, ready for `EncoderDecoder.decode`.

    tokens_R, positions_R: int64. layers: one entry for each layer of the decoder. detach: whether copied states are.
    Of the N states that leave, in the order of `decode`: out_L, the input row; copies_N, how many copies it is;
    layer_N, where it left. sizes: how many left at each layer. state_P: which of them each copy of each row became, by
    sample, copy and row.
    """

    tokens_R: Tensor
    positions_R: Tensor
    layers: tuple[ExitLayer, ...]
    detach: bool
    out_L: Tensor
    copies_N: Tensor
    layer_N: Tensor
    sizes: tuple[int, ...]
    state_P: Tensor

    @property
    def n_keys(self) -> int:
        return len(self.tokens_R)

    @property
    def self_mask(self) -> SampleMask:
        """Of the first layer, which every row goes through."""
        return self.layers[0].self_mask

    @property
    def cross_mask(self) -> SampleMask:
        return self.layers[0].cross_mask

    def work(self, layers: int) -> list[LayerWork]:
        """What each of the decoder's layers computes; there must be as many as exits were planned for."""
        if layers != len(self.layers):
            raise ValueError(f"exits were planned for {len(self.layers)} decoder layers, got {layers}")
        return [
            LayerWork(x.self_mask.n_rows, x.states, x.self_mask, x.cross_mask, x.key_K is not None) for x in self.layers
        ]

    def to(self, device: torch.device) -> "ExitRows":
        moved = to_device(self, device)
        return replace(moved, layers=tuple(to_device(layer, device) for layer in self.layers))


def pack_exits(samples: Sequence[ExitSample], layers: int, n_memory: int, detach: bool) -> ExitRows:
    """Packs samples and plans every layer.

    layers: of the decoder. n_memory: rows of the encoder's output.

    Raises:
        ValueError: an exit outside 1..layers, or exits of another shape than [k, tokens].
    """
    for sample in samples:
        shape, low, high = sample.exits.shape, sample.exits.min(initial=1), sample.exits.max(initial=1)
        if len(shape) != 2 or shape[1] != len(sample.tokens) or not shape[0] or low < 1 or high > layers:
            raise ValueError(
                f"exits must be [k, {len(sample.tokens)}] of layers 1..{layers}, got {list(shape)} of {low}..{high}"
            )
    copies = _Copies.of(samples)
    plans, left, frozen = [], list[_Left](), 0
    place_P, state_P = copies.base_P, np.zeros_like(copies.base_P)
    n_states = copies.rows
    for layer in range(1, layers + 1):
        units = copies.shared(layer) if layer <= (1 if detach else 2) else copies.apart(layer)
        leave_P, stay_P = copies.exit_P == layer, copies.exit_P > layer
        left_N, copies_N = np.unique(units.of_P[leave_P], return_counts=True)
        stays_S = np.unique(units.of_P[stay_P])
        plans.append(
            ExitLayer(
                n_states,
                _places(place_P[units.pairs], n_states),
                _places(place_P[units.keys], n_states),
                _mask(units.block_A, units.blocks, len(units.keys)),
                _mask(copies.sample_P[units.pairs], [sample.memory for sample in samples], n_memory),
                frozen,
                _tensor(left_N),
                _tensor(stays_S),
            )
        )
        place_P = place_P.copy()
        gone = np.searchsorted(left_N, units.of_P[leave_P])
        place_P[leave_P] = frozen + gone
        state_P[leave_P] = sum(len(x.rows) for x in left) + gone
        place_P[stay_P] = frozen + len(left_N) + np.searchsorted(stays_S, units.of_P[stay_P])
        left.append(_Left(copies.base_P[units.pairs[left_N]], copies_N, np.full(len(left_N), layer)))
        frozen += len(left_N)
        n_states = frozen + len(stays_S)
    return ExitRows(
        tokens_R=_joined([sample.tokens for sample in samples]),
        positions_R=_joined([sample.positions for sample in samples]),
        layers=tuple(plans),
        detach=detach,
        out_L=_joined([x.rows for x in left]),
        copies_N=_joined([x.copies for x in left]),
        layer_N=_joined([x.layers for x in left]),
        sizes=tuple(len(x.rows) for x in left),
        state_P=_tensor(state_P),
    )


class _Left(NamedTuple):
    """States that leave after one layer."""

    rows: np.ndarray
    copies: np.ndarray
    layers: np.ndarray


class _Units(NamedTuple):
    """What a layer computes. pairs: for each unit, a copy it stands for. of_P: the unit of each copy, -1 for none.

    keys: for each key, a copy that holds its state. block_A: the block of keys that a unit reads, of `blocks`, each
    (first key, keys).
    """

    pairs: np.ndarray
    of_P: np.ndarray
    keys: np.ndarray
    block_A: np.ndarray
    blocks: Sequence[tuple[int, int]]


class _Copies(NamedTuple):
    """Every copy of every row, by sample, copy and row; and of each row the copy that stays longest."""

    rows: int
    base_P: np.ndarray
    exit_P: np.ndarray
    sample_P: np.ndarray
    copy_P: np.ndarray
    longest_R: np.ndarray
    row_blocks: list[tuple[int, int]]
    copy_blocks: list[tuple[int, int]]

    @classmethod
    def of(cls, samples: Sequence[ExitSample]) -> "_Copies":
        lengths = [len(sample.tokens) for sample in samples]
        starts = np.cumsum([0, *lengths])
        counts = [len(sample.exits) for sample in samples]
        base = [np.tile(np.arange(n) + start, k) for n, start, k in zip(lengths, starts, counts, strict=False)]
        base_P = _flat(base)
        exit_P = _flat([sample.exits.reshape(-1) for sample in samples])
        blocks = [n for n, k in zip(lengths, counts, strict=True) for _ in range(k)]
        by_row = np.lexsort((exit_P, base_P))
        last = np.append(np.diff(base_P[by_row]) > 0, True)[: len(by_row)]
        return cls(
            int(starts[-1]),
            base_P,
            exit_P,
            np.repeat(np.arange(len(samples)), [n * k for n, k in zip(lengths, counts, strict=True)]),
            np.repeat(np.arange(len(blocks)), blocks),
            by_row[last],
            list(zip(starts[:-1].tolist(), lengths, strict=True)),
            list(zip((np.cumsum(blocks) - blocks).tolist() if blocks else [], blocks, strict=True)),
        )

    def shared(self, layer: int) -> _Units:
        """A unit for each row of which some copy has not left: all its copies are the same number here."""
        pairs = self.longest_R[self.exit_P[self.longest_R] >= layer]
        unit_R = np.full(self.rows, -1)
        unit_R[self.base_P[pairs]] = np.arange(len(pairs))
        of_P = np.where(self.exit_P >= layer, unit_R[self.base_P], -1)
        return _Units(pairs, of_P, self.longest_R, self.sample_P[pairs], self.row_blocks)

    def apart(self, layer: int) -> _Units:
        """A unit for each copy that has not left."""
        pairs = np.flatnonzero(self.exit_P >= layer)
        of_P = np.full(len(self.exit_P), -1)
        of_P[pairs] = np.arange(len(pairs))
        return _Units(pairs, of_P, np.arange(len(self.exit_P)), self.copy_P[pairs], self.copy_blocks)


def _mask(block_A: np.ndarray, blocks: Sequence[tuple[int, int]], n_keys: int) -> SampleMask:
    """Rows that read the whole block of keys they belong to."""
    rows = np.bincount(block_A, minlength=len(blocks))
    starts = np.cumsum(rows) - rows
    table = [(int(starts[b]), int(rows[b]), *blocks[b], 0, 0, 0, 0) for b in np.flatnonzero(rows).tolist()]
    return SampleMask.build(table, n_keys)


def _places(states: np.ndarray, n_states: int) -> Tensor | None:
    return None if np.array_equal(states, np.arange(n_states)) else _tensor(states)


def _flat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([*parts, np.empty(0, np.int64)])


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return _tensor(_flat(parts))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))

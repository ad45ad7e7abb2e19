"""Packed rows: what the model eats. No padding; a mask says who reads whom.

Shapes: R rows, M memory rows (encoder output), L rows whose output is used, B samples.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from parlance_kernels import SampleMask

RowsT = TypeVar("RowsT", bound=Any)


class LayerWork(NamedTuple):
    """What a decoder layer computes: rows with queries and outputs, keys that it projects, and who reads whom.

    gathered: whether the keys that are read are copies of those that were projected.
    """

    rows: int
    keys: int
    self_mask: SampleMask
    cross_mask: SampleMask
    gathered: bool = False


def to_device(rows: RowsT, device: torch.device) -> RowsT:
    """Copies every tensor field to `device`; masks stay tables on the host."""
    moved: dict[str, Any] = {
        name: v.to(device, non_blocking=True) for name, v in vars(rows).items() if isinstance(v, Tensor)
    }
    return replace(rows, **moved)


@dataclass(frozen=True)
class SourceRows:
    """Encoder input. tokens_R, positions_R, sample_R: int64; sample_R is non-decreasing, n_samples = B.

    number_B: int64, which source of a file each is, whatever the batch: decoders that draw take their random numbers
    from it. None where nothing is drawn, or where the place in the batch will do.
    """

    tokens_R: Tensor
    positions_R: Tensor
    sample_R: Tensor
    n_samples: int
    mask: SampleMask
    number_B: Tensor | None = None

    @classmethod
    def pack(cls, sources: Sequence[np.ndarray], numbers: Sequence[int] | None = None) -> "SourceRows":
        """Packs int arrays (each with its BOS and EOS) one behind the other; numbers: `number_B`."""
        lengths = np.array([len(source) for source in sources], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        rows = int(lengths.sum())
        sample = np.repeat(np.arange(len(sources)), lengths)
        table = [
            (start, length, start, length) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        mask = SampleMask.build([(*line, 0, 0, 0, 0) for line in table], rows)
        tokens = np.concatenate([*sources, np.empty(0, np.int64)])
        number_B = None if numbers is None else _int64(np.array(numbers))
        positions = _int64(np.arange(rows) - starts[sample])
        return cls(_int64(tokens), positions, _int64(sample), len(sources), mask, number_B)

    def memory_range(self, sample: int) -> tuple[int, int]:
        """(first row, number of rows) of a sample in the encoder output."""
        line = self.mask.table[sample]
        return int(line[0]), int(line[1])


@dataclass(frozen=True)
class DecoderRows:
    """Decoder input: content rows first (row i is key i), query rows behind them.

    tokens_R, positions_R: int64. n_keys: number of content rows. self_mask: R rows over n_keys keys;
    cross_mask: R rows over M memory rows. out_L: int64 rows whose output is used, increasing; the last layer
    computes only these, under out_self_mask and out_cross_mask.
    """

    tokens_R: Tensor
    positions_R: Tensor
    n_keys: int
    self_mask: SampleMask
    cross_mask: SampleMask
    out_L: Tensor
    out_self_mask: SampleMask
    out_cross_mask: SampleMask

    def work(self, layers: int) -> list[LayerWork]:
        """What each of the decoder's layers computes."""
        inner = LayerWork(self.self_mask.n_rows, self.n_keys, self.self_mask, self.cross_mask)
        last = LayerWork(len(self.out_L), self.n_keys, self.out_self_mask, self.out_cross_mask)
        return [inner] * (layers - 1) + [last]

    def to(self, device: torch.device) -> "DecoderRows":
        return to_device(self, device)


@dataclass
class Stream:
    """Rows of one sample in one stream, before packing.

    segments: (rows, prefix, prefix_step, window_start, window_step, window_len) in the stream's own keys.
    memory: (start, length) of the encoder rows it reads. used: (start, stop) of the rows whose output is used.
    targets: int64 [stop - start], the right token of each used row. term: index of its cross-entropy term.
    content: None for a content stream, which has keys of its own; else the content stream whose keys it reads.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: Sequence[tuple[int, int, int, int, int, int]]
    memory: tuple[int, int]
    used: tuple[int, int]
    targets: np.ndarray
    term: int
    content: "Stream | None" = None
    row_start: int = field(default=0, init=False)
    out_start: int = field(default=0, init=False)


def pack_streams(streams: Iterable[Stream], n_memory: int) -> tuple[DecoderRows, Tensor, Tensor]:
    """Packs streams, contents before queries; fills in each stream's `row_start` and `out_start`.

    Returns:
        rows, target_L (int64), term_L (int64), the last two in the order of `rows.out_L`.
    """
    given = list(streams)
    ordered = [s for s in given if s.content is None] + [s for s in given if s.content is not None]
    n_keys = sum(len(s.tokens) for s in ordered if s.content is None)
    self_table: list[tuple[int, ...]] = []
    cross_table: list[tuple[int, ...]] = []
    used: list[tuple[int, int]] = []
    row = out = 0
    for s in ordered:
        s.row_start, s.out_start = row, out
        key_start = (s.content or s).row_start
        cross_table.append((row, len(s.tokens), s.memory[0], s.memory[1], 0, 0, 0, 0))
        first, stop = row + s.used[0], row + s.used[1]
        for rows, *pattern in s.segments:
            self_table.append((row, rows, key_start, *pattern))
            if first < row + rows and stop > row:
                used.append((max(first, row), min(stop, row + rows)))
            row += rows
        out += s.used[1] - s.used[0]
    self_mask = SampleMask.build(self_table, n_keys)
    cross_mask = SampleMask.build(cross_table, n_memory)
    packed = DecoderRows(
        tokens_R=_concatenate([s.tokens for s in ordered]),
        positions_R=_concatenate([s.positions for s in ordered]),
        n_keys=n_keys,
        self_mask=self_mask,
        cross_mask=cross_mask.merged(),
        out_L=_concatenate([np.arange(start, stop) for start, stop in used]),
        out_self_mask=self_mask.restrict(used),
        out_cross_mask=cross_mask.restrict(used).merged(),
    )
    terms = [np.full(s.used[1] - s.used[0], s.term) for s in ordered]
    return packed, _concatenate([s.targets for s in ordered]), _concatenate(terms)


def _concatenate(parts: Sequence[np.ndarray]) -> Tensor:
    return _int64(np.concatenate([*parts, np.empty(0, np.int64)]))


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))

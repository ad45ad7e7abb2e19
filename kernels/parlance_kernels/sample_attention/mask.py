"""SampleMask: who may read whom, as eight integers a segment instead of a mask tensor.

Order the keys of a sample `[visible | MASK | compensation]`; then every row of every pattern in this project
reads a prefix of its sample's keys plus one window that slides with the row. Row r of a segment reads

    key_start + [0, prefix + r * prefix_step)
    key_start + [window_start + r * window_step, window_start + r * window_step + window_len)

| rows                                    | prefix | prefix_step | window_start | window_step | window_len |
|-----------------------------------------|--------|-------------|--------------|-------------|------------|
| encoder, NAR, cross-attention           | keys   | 0           | 0            | 0           | 0          |
| causal content, AR query                | 1      | 1           | 0            | 0           | 0          |
| AUX compensation row k of M             | V      | 0           | V + 1        | 1           | M          |
| AUX query row k of M                    | V      | 0           | V            | 1           | M          |

Shapes: R rows, K keys, S segments.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Segment(NamedTuple):
    """Rows of one sample and one kind; all fields are counts or offsets in rows and keys of the packed buffers."""

    row_start: int
    rows: int
    key_start: int
    prefix: int
    prefix_step: int = 0
    window_start: int = 0
    window_step: int = 0
    window_len: int = 0


class Group(NamedTuple):
    """Segments of equal shape, which one dense attention call can serve together.

    rows, keys: extent of each member; pattern: `full`, `causal` or `mask`; visible: bool [rows, keys] for `mask`.
    members: indices into the segment table. key_starts: first key of each member.
    """

    rows: int
    keys: int
    pattern: str
    visible: Tensor | None
    members: list[int]
    key_starts: list[int]


@dataclass(frozen=True, eq=False)
class SampleMask:
    """An immutable segment table over `n_keys` keys; its segments cover rows 0..n_rows-1 in order, without gaps.

    table: int32 numpy [S, 8], one `Segment` a line, read-only.
    """

    table: np.ndarray
    n_keys: int

    @classmethod
    def build(cls, segments: Iterable[Sequence[int]], n_keys: int) -> "SampleMask":
        """Makes a mask from `Segment`s (or 8-tuples) and checks it.

        Raises:
            ValueError: if rows are not covered in order, a row reads outside the keys, reads a key twice or none.
        """
        table = np.array([tuple(segment) for segment in segments], dtype=np.int32).reshape(-1, 8)
        table.setflags(write=False)
        mask = cls(table, int(n_keys))
        mask._check()
        return mask

    @property
    def n_rows(self) -> int:
        return int(self.table[-1, 0] + self.table[-1, 1]) if len(self.table) else 0

    @property
    def nbytes(self) -> int:
        """Size of the whole mask in bytes: 32 a segment."""
        return int(self.table.nbytes)

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Segment]:
        return (Segment(*map(int, line)) for line in self.table)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleMask):
            return NotImplemented
        return self.n_keys == other.n_keys and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash((self.n_keys, self.table.tobytes()))

    def __reduce__(self) -> tuple[type["SampleMask"], tuple[np.ndarray, int]]:
        return SampleMask, (self.table, self.n_keys)

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The table as int32 [S, 8] on `device`, the form a compiled kernel takes."""
        return torch.tensor(self.table, device=device)

    def materialise(self) -> Tensor:
        """bool [R, K], True where the row may read the key: the definition, for references and pictures."""
        dense = torch.zeros(self.n_rows, self.n_keys, dtype=torch.bool)
        for segment in self:
            local = visible(segment)
            rows = slice(segment.row_start, segment.row_start + segment.rows)
            dense[rows, segment.key_start : segment.key_start + local.shape[1]] = local
        return dense

    def visible_pairs(self) -> int:
        """Number of (row, key) pairs that attend: what attention must compute."""
        t = self.table.astype(np.int64)
        rows = t[:, 1]
        return int((rows * (t[:, 3] + t[:, 7]) + t[:, 4] * rows * (rows - 1) // 2).sum())

    def restrict(self, ranges: Iterable[tuple[int, int]]) -> "SampleMask":
        """The mask of the rows in `ranges` only, renumbered from 0; each (start, stop) must lie in one segment."""
        starts = self.table[:, 0]
        cut, row = [], 0
        for start, stop in ranges:
            if stop <= start:
                continue
            s = Segment(*map(int, self.table[int(np.searchsorted(starts, start, side="right")) - 1]))
            skipped = start - s.row_start
            if stop > s.row_start + s.rows:
                raise ValueError(f"rows [{start}, {stop}) must lie in one segment, got {s}")
            cut.append(
                s._replace(
                    row_start=row,
                    rows=stop - start,
                    prefix=s.prefix + skipped * s.prefix_step,
                    window_start=s.window_start + skipped * s.window_step,
                )
            )
            row += stop - start
        return SampleMask.build(cut, self.n_keys)

    def merged(self) -> "SampleMask":
        """The same mask with adjacent segments joined where all their rows read the same keys."""
        joined: list[Segment] = []
        for s in self:
            last = joined[-1] if joined else None
            if last and last[2:] == s[2:] and not s.prefix_step and not s.window_step:
                joined[-1] = last._replace(rows=last.rows + s.rows)
            else:
                joined.append(s)
        return SampleMask.build(joined, self.n_keys)

    @cached_property
    def kept(self) -> dict[object, object]:
        """What a backend makes of this mask once and uses in every layer."""
        return {}

    @cached_property
    def groups(self) -> list[Group]:
        """Segments gathered by equal shape, in order of first appearance."""
        found: dict[tuple[int, ...], list[int]] = {}
        for index, line in enumerate(self.table.tolist()):
            found.setdefault((line[1], *line[3:]), []).append(index)
        return [self._group(members) for members in found.values()]

    def _group(self, members: list[int]) -> Group:
        first = Segment(*map(int, self.table[members[0]]))
        local = visible(first)
        rows, keys = local.shape
        pattern = "mask"
        if bool(local.all()):
            pattern = "full"
        elif rows == keys and first.prefix == 1 and first.prefix_step == 1 and not first.window_len:
            pattern = "causal"
        starts = self.table[members, 2].tolist()
        return Group(rows, keys, pattern, local if pattern == "mask" else None, members, starts)

    def _check(self) -> None:
        t = self.table.astype(np.int64)
        if not len(t):
            return
        row_start, rows, key_start, prefix, prefix_step, window_start, window_step, window_len = t.T
        expected = np.concatenate([[0], np.cumsum(rows)[:-1]])
        if (rows < 1).any() or not np.array_equal(row_start, expected):
            raise ValueError("segments must cover the rows in order without gaps, each with at least one row")
        last = rows - 1
        for r in (np.zeros_like(rows), last):
            prefix_end = prefix + r * prefix_step
            window_first = window_start + r * window_step
            end = np.where(window_len > 0, np.maximum(prefix_end, window_first + window_len), prefix_end)
            bad = (prefix_end < 0) | (key_start < 0) | (key_start + end > self.n_keys) | (window_len < 0)
            bad |= prefix_end + window_len < 1
            bad |= (window_len > 0) & (window_first < prefix_end)
            if bad.any():
                raise ValueError(
                    f"every row must read 1..{self.n_keys} keys, each once and inside the buffer; "
                    f"got {Segment(*map(int, self.table[int(bad.argmax())]))}"
                )


def visible(segment: Segment) -> Tensor:
    """bool [rows, extent]: the rows of one segment over its own keys, the definition written out."""
    r = torch.arange(segment.rows)[:, None]
    prefix_end = segment.prefix + r * segment.prefix_step
    window_first = segment.window_start + r * segment.window_step
    window_end = window_first + segment.window_len
    ends = torch.maximum(prefix_end, window_end if segment.window_len else prefix_end)
    key = torch.arange(int(ends.max()))[None, :]
    return (key < prefix_end) | ((key >= window_first) & (key < window_end))

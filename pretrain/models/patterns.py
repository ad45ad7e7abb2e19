"""The decoding patterns of one sample as streams of rows: causal, AR two-stream, NAR and AUX.

A target is t = [BOS, y_1 .. y_N, EOS]. Two layouts of the AR pattern exist (JANUS, section 3.1; BART):

    bos_first   content BOS y_1 .. y_N          row i predicts t[i + 1]
    eos_first   content EOS BOS y_1 .. y_N      row i predicts t[i]

NAR and AUX share one content stream [visible | MASK | compensation] with positions of the tokens they stand for.
ELMER reads MASKs alone (`mask_rows`).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pretrain.models.ids import SpecialIds
from pretrain.models.rows import Stream

Layout = Literal["bos_first", "eos_first"]
FirstRow = Literal["mask", "bos"]


@dataclass(frozen=True)
class ArLayout:
    """Where the AR pattern starts and which position its query rows carry.

    query_position_offset: a query row i carries position i + offset. Aligned with NAR, where the row that predicts
    t[j] carries position j, means 1 for `bos_first` and 0 for `eos_first`; the released NMT code has 0 with
    `bos_first`.
    """

    layout: Layout
    query_position_offset: int
    ids: SpecialIds

    @classmethod
    def aligned(cls, layout: Layout, ids: SpecialIds) -> "ArLayout":
        return cls(layout, 1 if layout == "bos_first" else 0, ids)

    @property
    def shift(self) -> int:
        """Row i predicts t[i + shift]."""
        return 1 if self.layout == "bos_first" else 0

    @property
    def start(self) -> list[int]:
        """Content tokens a generation begins with; BOS is forced behind EOS, as BART does."""
        return [self.ids.bos] if self.layout == "bos_first" else [self.ids.eos, self.ids.bos]

    def content(self, target: np.ndarray) -> np.ndarray:
        """The decoder input whose row i predicts t[i + shift]."""
        return target[:-1] if self.shift else np.concatenate([[self.ids.eos], target[:-1]])


def causal(target: np.ndarray, memory: tuple[int, int], layout: ArLayout, term: int) -> Stream:
    """Plain left-to-right decoding on the content stream: BART."""
    tokens = layout.content(target)
    rows = len(tokens)
    segments = [(rows, 1, 1, 0, 0, 0)]
    return Stream(tokens, np.arange(rows), segments, memory, (0, rows), target[layout.shift :], term)


def ar_two_stream(target: np.ndarray, memory: tuple[int, int], layout: ArLayout, term: int) -> tuple[Stream, Stream]:
    """Content rows that are only read, and query rows that predict (SYSTEMS: content row i, query row i read 0..i)."""
    content = causal(target, memory, layout, term)
    rows = len(content.tokens)
    content.used, content.targets = (0, 0), content.targets[:0]
    query = Stream(
        np.full(rows, layout.ids.mask),
        np.arange(rows) + layout.query_position_offset,
        content.segments,
        memory,
        (0, rows),
        target[layout.shift :],
        term,
        content,
    )
    return content, query


def nar(target: np.ndarray, masked: np.ndarray, memory: tuple[int, int], mask_id: int, term: int) -> Stream:
    """Visible tokens and MASK rows that all read each other; the MASK rows predict."""
    return _nar_content(target, masked, memory, mask_id, term, compensation=False)


def nar_aux(
    target: np.ndarray, masked: np.ndarray, memory: tuple[int, int], mask_id: int, nar_term: int, aux_term: int
) -> tuple[Stream, Stream]:
    """NAR content with the true masked tokens behind it, and the AUX query rows (JANUS, section 3.1).

    AUX row k reads the visible tokens, the truth of masked ranks < k and the MASKs of ranks >= k.
    """
    content = _nar_content(target, masked, memory, mask_id, nar_term, compensation=True)
    hidden, visible = len(masked), len(target) - len(masked)
    query = Stream(
        np.full(hidden, mask_id),
        masked,
        [(hidden, visible, 0, visible, 1, hidden)],
        memory,
        (0, hidden),
        target[masked],
        aux_term,
        content,
    )
    return content, query


def mask_rows(n: int, ids: SpecialIds, first_row: FirstRow) -> np.ndarray:
    """Decoder input of ELMER for n tokens behind BOS: row i, at position i, predicts t[i + 1].

    first_row: a MASK as all others (ELMER, section 4.1), or BOS (the released code).
    """
    tokens = np.full(n, ids.mask)
    if first_row == "bos":
        tokens[:1] = ids.bos
    return tokens


def all_masks(targets: np.ndarray, memory: tuple[int, int], ids: SpecialIds, first_row: FirstRow, term: int) -> Stream:
    """A row for each target, of a token or of none, that all read each other and know nothing of the text."""
    n = len(targets)
    rows, positions = mask_rows(n, ids, first_row), np.arange(n)
    return Stream(rows, positions, [(n, n, 0, 0, 0, 0)], memory, (0, n), targets, term)


def _nar_content(
    target: np.ndarray, masked: np.ndarray, memory: tuple[int, int], mask_id: int, term: int, compensation: bool
) -> Stream:
    keep = np.ones(len(target), dtype=bool)
    keep[masked] = False
    visible = np.flatnonzero(keep)
    seen, hidden = len(visible), len(masked)
    truth = target[masked]
    tokens = [target[visible], np.full(hidden, mask_id)]
    positions = [visible, masked]
    segments = [(seen + hidden, seen + hidden, 0, 0, 0, 0)]
    if compensation and hidden:
        tokens.append(truth)
        positions.append(masked)
        segments.append((hidden, seen, 0, seen + 1, 1, hidden))
    used = (seen, seen + hidden)
    return Stream(np.concatenate(tokens), np.concatenate(positions), segments, memory, used, truth, term)

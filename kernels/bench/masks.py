"""Bytes of a dense boolean mask over bytes of the segments that say the same, checked pair by pair."""

import numpy as np
from harness import Row, require

from parlance_kernels import SampleMask

T, HIDDEN, PAIRS = 512, 256, 10_000_000


def janus_mask(visible: int, hidden: int) -> SampleMask:
    """AR content, NAR, compensation, AR query and AUX query rows of one sample."""
    n = visible + hidden
    segments = [
        (0, n, 0, 1, 1, 0, 0, 0),
        (n, n, n, n, 0, 0, 0, 0),
        (2 * n, hidden, n, visible, 0, visible + 1, 1, hidden),
        (2 * n + hidden, n, 0, 1, 1, 0, 0, 0),
        (3 * n + hidden, hidden, n, visible, 0, visible, 1, hidden),
    ]
    return SampleMask.build(segments, 2 * n + hidden)


def defined(row: np.ndarray, key: np.ndarray, visible: int, hidden: int) -> np.ndarray:
    """The predicates of SYSTEMS A.3 on kinds and ranks, for (row, key) pairs of one sample."""
    n = visible + hidden
    edges = np.array([0, n, 2 * n, 2 * n + hidden, 3 * n + hidden, 3 * n + 2 * hidden])
    kind = np.searchsorted(edges, row, side="right") - 1
    rank = row - edges[kind]
    ar_key = key < n
    place = key - n
    is_visible = ~ar_key & (place < visible)
    mask_rank = np.where((place >= visible) & (place < n), place - visible, -1)
    truth_rank = np.where(place >= n, place - n, -1)
    causal = ar_key & (key <= rank)
    nar = is_visible | (mask_rank >= 0)
    content = is_visible | (mask_rank > rank) | ((truth_rank >= 0) & (truth_rank <= rank))
    query = is_visible | (mask_rank >= rank) & (mask_rank >= 0) | ((truth_rank >= 0) & (truth_rank < rank))
    return np.select([kind == 0, kind == 1, kind == 2, kind == 3], [causal, nar, content, causal], query)


def rows() -> list[Row]:
    """`mask_bytes`: at T = 512 with half of the target masked, after 10 million random pairs without a mismatch."""
    rng = np.random.default_rng(0)
    checked = mismatches = 0
    while checked < PAIRS:
        visible, hidden = int(rng.integers(1, 300)), int(rng.integers(1, 300))
        mask = janus_mask(visible, hidden)
        row, key = (rng.integers(0, size, 1_000_000) for size in (mask.n_rows, mask.n_keys))
        mismatches += int((mask.materialise().numpy()[row, key] != defined(row, key, visible, hidden)).sum())
        checked += len(row)
    require(not mismatches, f"masks must agree on every pair, got {mismatches} mismatches of {checked}")
    mask = janus_mask(T - HIDDEN, HIDDEN)
    # What the released code builds: a causal T x T for both AR streams, content and query masks for NAR and AUX.
    dense = 2 * T * T + (T + HIDDEN) ** 2 + HIDDEN * (T + HIDDEN)
    detail = f"{dense} bytes over {mask.nbytes}; T={T}, {HIDDEN} masked; 0 mismatches on {checked:,} random pairs"
    return [Row("mask_bytes", dense / mask.nbytes, 8_000, "min", detail)]

"""SampleMask says exactly what the predicates of the papers say, and refuses everything else."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parlance_kernels import SampleMask


def nar_aux_mask(visible, hidden):
    """NAR rows, compensation rows and query rows of one sample over [visible | MASK | compensation]."""
    n = visible + hidden
    return SampleMask.build(
        [
            (0, n, 0, n, 0, 0, 0, 0),
            (n, hidden, 0, visible, 0, visible + 1, 1, hidden),
            (n + hidden, hidden, 0, visible, 0, visible, 1, hidden),
        ],
        n + hidden,
    )


def defined(visible, hidden):
    """The same by kinds and ranks, pair by pair."""
    keys = [("V", 0)] * visible + [("M", k) for k in range(hidden)] + [("G", k) for k in range(hidden)]
    rows = keys + [("Q", k) for k in range(hidden)]

    def reads(row, key):
        (kind, rank), (key_kind, key_rank) = row, key
        if kind in "VM":
            return key_kind in "VM"
        after = key_rank > rank if kind == "G" else key_rank >= rank
        before = key_rank <= rank if kind == "G" else key_rank < rank
        return key_kind == "V" or (key_kind == "M" and after) or (key_kind == "G" and before)

    return torch.tensor([[reads(row, key) for key in keys] for row in rows])


def test_worked_example_of_the_paper():
    # Y = y1..y6, S = {2, 3, 5}; columns y1 y4 y6 | m2 m3 m5 | g2 g3 g5.
    dense = nar_aux_mask(3, 3).materialise()
    expected = ["111111000"] * 6 + ["111011100", "111001110", "111000111"] + ["111111000", "111011100", "111001110"]
    assert ["".join(str(int(x)) for x in row) for row in dense] == expected
    assert int(dense[:9].sum()) == 54
    assert int(dense[9:].sum()) == 18


@given(st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_equals_the_definition_and_every_row_sees_each_position_once(visible, hidden):
    mask = nar_aux_mask(visible, hidden)
    dense = mask.materialise()
    assert torch.equal(dense, defined(visible, hidden))
    assert (dense.sum(dim=1) == visible + hidden).all()
    assert mask.visible_pairs() == int(dense.sum())


@st.composite
def masks(draw):
    """Random valid masks of several samples with every pattern."""
    segments, row, key = [], 0, 0
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["full", "causal", "aux"]))
        n, hidden = draw(st.integers(1, 7)), draw(st.integers(1, 5))
        if kind == "full":
            rows = draw(st.integers(1, 6))
            segments.append((row, rows, key, n, 0, 0, 0, 0))
            row, key = row + rows, key + n
        elif kind == "causal":
            segments.append((row, n, key, 1, 1, 0, 0, 0))
            row, key = row + n, key + n
        else:
            segments.append((row, hidden, key, n, 0, n + 1, 1, hidden))
            row, key = row + hidden, key + n + 2 * hidden
    return SampleMask.build(segments, key)


@given(masks(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_restrict_keeps_the_chosen_rows(mask, random):
    ranges = []
    for s in mask:
        start = random.randint(s.row_start, s.row_start + s.rows)
        ranges.append((start, random.randint(start, s.row_start + s.rows)))
    chosen = [row for start, stop in ranges for row in range(start, stop)]
    assert torch.equal(mask.restrict(ranges).materialise(), mask.materialise()[chosen])


@given(masks())
@settings(max_examples=30, deadline=None)
def test_survives_pickling_merging_and_grouping(mask):
    again = pickle.loads(pickle.dumps(mask))
    assert again == mask
    assert hash(again) == hash(mask)
    assert torch.equal(mask.merged().materialise(), mask.materialise())
    assert sorted(i for group in mask.groups for i in group.members) == list(range(len(mask)))


def test_merging_joins_rows_that_read_the_same_keys():
    mask = SampleMask.build([(0, 2, 0, 4, 0, 0, 0, 0), (2, 3, 0, 4, 0, 0, 0, 0)], 4)
    assert len(mask.merged()) == 1


@pytest.mark.parametrize(
    "segment",
    [
        (0, 2, 0, 0, 0, 0, 0, 0),  # reads nothing
        (0, 2, 0, 5, 0, 0, 0, 0),  # past the keys
        (0, 2, 3, 1, 1, 0, 0, 0),  # second row past the keys
        (0, 2, -1, 1, 0, 0, 0, 0),  # before the keys
        (0, 2, 0, 2, 0, 1, 0, 2),  # prefix and window overlap
        (1, 2, 0, 1, 0, 0, 0, 0),  # gap before the first row
        (0, 0, 0, 1, 0, 0, 0, 0),  # no rows
    ],
)
def test_refuses_what_is_not_a_mask(segment):
    with pytest.raises(ValueError, match="must"):
        SampleMask.build([segment], 4)


def test_is_immutable_and_small():
    mask = nar_aux_mask(256, 256)
    assert mask.nbytes == 3 * 32
    with pytest.raises(ValueError, match="read-only"):
        mask.table[0, 0] = 1
    assert mask.tensor().dtype == torch.int32
    assert np.array_equal(mask.tensor().numpy(), mask.table)

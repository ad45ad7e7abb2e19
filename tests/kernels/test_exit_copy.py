"""`exit_copy` equals its definition, gradients included, and refuses what cannot be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parlance_kernels import exit_copy
from parlance_kernels.exit_copy.reference import exit_copy_reference


def rows_of(count):
    return st.lists(st.integers(0, count - 1), unique=True).map(sorted) if count else st.just([])


@given(st.data(), st.integers(0, 6), st.integers(0, 7), st.booleans())
def test_equals_the_definition(data, states, computed, detach):
    frozen = data.draw(st.integers(0, states))
    left, stays = (torch.tensor(data.draw(rows_of(computed)), dtype=torch.int64) for _ in range(2))
    generator = torch.Generator().manual_seed(states * 10 + computed)
    given = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (states, computed)]
    sizes = frozen + len(left) + len(stays), len(left)
    weights = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in sizes]
    found = []
    for op in (exit_copy, exit_copy_reference):
        table, out = (x.clone().requires_grad_() for x in given)
        results = op(table, frozen, out, left, stays, detach)
        nothing = 0.0 * (table.sum() + out.sum())  # for a graph also where no result has one
        (nothing + sum((a * b).sum() for a, b in zip(results, weights, strict=True))).backward()
        found.append([*results, *(torch.zeros_like(x) if x.grad is None else x.grad for x in (table, out))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_bad_arguments():
    table, out, some = torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`frozen` must be 0\.\.3 and both widths 4, got 4 and 4"):
        exit_copy(table, 4, out, some, some, False)
    with pytest.raises(ValueError, match="got 0 and 5"):
        exit_copy(table, 0, torch.zeros(2, 5), some, some, False)
    with pytest.raises(ValueError, match="backend `cdua` must be one of"):
        exit_copy(table, 0, out, some, some, False, backend="cdua")

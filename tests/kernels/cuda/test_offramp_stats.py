"""The kernel of `offramp_stats` on the emulator and the torch backend against float64, for every kind of row."""

import math

import pytest
import torch

from parlance_kernels import offramp_stats
from parlance_kernels.offramp_stats import cuda
from parlance_kernels.offramp_stats.reference import offramp_stats_reference
from tests.kernels.cuda.emulation import emulated, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(logits, banned=(), offset=0, reverse=False):
    with emulated(reverse):
        return cuda.stats_cuda(guarded(logits, offset)[0], list(banned))


def logits(rows, vocabulary, dtype, scale=4.0, seed=0):
    return (torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 5), (1, 1), (3, 2), (5, 7), (2, 33), (3, 1003), (2, 5021)])
def test_equals_the_definition(rows, vocabulary, dtype, reverse):
    x = logits(rows, vocabulary, dtype, seed=vocabulary)
    banned = [0, vocabulary - 1] if vocabulary > 2 else []
    found = run(x, banned, offset=rows % 2 + 1, reverse=reverse)
    torch_ = offramp_stats(x, banned, backend="torch")
    assert [a.dtype for a in found] == [a.dtype for a in torch_]
    if not rows:
        assert [a.shape for a in found] == [(0,)] * 5
        return
    exact = offramp_stats_reference(x.double(), banned)
    for ours, theirs, right in zip(found, torch_, exact, strict=True):
        torch.testing.assert_close(ours, right.to(ours.dtype), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs, right.to(theirs.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_give_the_lowest_token_and_the_whole_entropy(dtype):
    for size in (1, 9, 300, 2049):
        x = torch.full((2, size), 3.0, dtype=dtype)
        entropy, token, log_p, most, lse = run(x)
        assert token.tolist() == [0, 0]
        torch.testing.assert_close(entropy, torch.full((2,), math.log(size)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(log_p, torch.full((2,), -math.log(size)), rtol=1e-6, atol=1e-6)
        assert most.tolist() == [3.0, 3.0]
        torch.testing.assert_close(lse, 3.0 + torch.full((2,), math.log(size)))
    two = torch.zeros(1, 2000, dtype=dtype)
    two[0, [1733, 1027]] = 5.0
    assert run(two)[1].tolist() == [1027]
    assert run(two, banned=[1027])[1].tolist() == [1733]
    assert run(two, banned=[1027, 1733, 0])[1].tolist() == [1]


def test_a_certain_row_has_entropy_zero_and_hidden_tokens_no_weight():
    x = torch.full((2, 700), -torch.inf)
    x[0, 650], x[1, [3, 699]] = 80.0, -90.0
    for stats in (run(x), offramp_stats(x, backend="torch")):
        torch.testing.assert_close(stats[0], torch.tensor([0.0, math.log(2)]))
        assert stats[0][0] == 0.0
        assert stats[1].tolist() == [650, 3]
        torch.testing.assert_close(stats[4], torch.tensor([80.0, -90.0 + math.log(2)]))


def test_a_row_that_is_no_number_is_never_sure():
    x = logits(2, 500, torch.float32)
    x[1, 77] = torch.nan
    for stats in (run(x), offramp_stats(x, backend="torch")):
        assert stats[0].isnan().tolist() == [False, True]
        assert not stats[0][1] < 1e9


def test_far_logits_do_not_overflow():
    x = logits(3, 400, torch.float32, scale=1e4)
    for ours, right in zip(run(x), offramp_stats_reference(x.double()), strict=True):
        torch.testing.assert_close(ours, right.to(ours.dtype), rtol=1e-5, atol=1e-5)


def test_the_logits_stay_unless_they_may_go():
    x = logits(3, 20, torch.float32)
    kept = x.clone()
    offramp_stats(x, [2], backend="torch")
    assert torch.equal(x, kept)
    offramp_stats(x, [2], overwrite=True, backend="torch")
    assert not torch.equal(x, kept)


def test_bad_arguments():
    x = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"must be \[rows, vocabulary\], got \[5\]"):
        offramp_stats(x[0])
    with pytest.raises(ValueError, match=r"banned tokens must be 0\.\.4, got \[1, 5\]"):
        offramp_stats(x, [1, 5])
    with pytest.raises(ValueError, match="at most 16 tokens may be banned, got 17"):
        cuda.stats_cuda(torch.zeros(2, 50), list(range(17)))
    with pytest.raises(ValueError, match="float32, float16 or bfloat16, got float64"):
        run(x.double())


def test_the_operator_is_well_formed():
    for banned in ([], [1, 2]):
        torch.library.opcheck(torch.ops.parlance.offramp_stats.default, (logits(3, 9, torch.float32), banned))

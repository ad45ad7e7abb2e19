"""The split of a mask into library calls is exact: every pair once, and merged results and gradients are the whole's.

The library's calls need a GPU (tests/gpu/test_library_attention.py); here their definition stands in for them.
"""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from parlance_kernels import SampleMask, backend, sample_attention
from parlance_kernels.sample_attention import flash, op
from parlance_kernels.sample_attention.reference import sample_attention_reference
from parlance_kernels.sample_attention.split import split, unpack
from tests.kernels import flash_definition
from tests.kernels.cuda.attention import causal, exact, janus, mask_of, tensors

CPU = torch.device("cpu")
HEADS, WIDTH, SCALE = 2, 3, 0.7
LENGTHS = st.one_of(st.integers(0, 6), st.integers(0, 70))


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """The definition in place of the library; memory that nobody has written to is NaN."""
    flash_definition.install(monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def lines(visible, hidden, more):
    """Every pattern of rows over a sample's keys: (rows, prefix, its step, window, its step, length)."""
    n = visible + hidden
    known = [(n, n, 0, 0, 0, 0), (n, 1, 1, 0, 0, 0), (1, n, 7, 0, 0, 0), (more, n, 0, 0, 0, 0)]
    known += [(n, 1 + more, 1, 0, 0, 0), (hidden, visible, 0, n + 1, 0, more), (1, visible, 5, visible + 9, -3, hidden)]
    for start in (visible, visible + 1):  # queries and truths; fewer rows than the window has keys; more
        known += [(rows, visible, 0, start, 1, hidden) for rows in (hidden, hidden // 2, hidden + more)]
    known += [(hidden, 0, 1, n, 1, more + 1), (hidden, 2, 1, n + 2, 0, more), (hidden, 0, 0, visible, 1, 1)]

    def reads_something(line):
        rows, prefix, _, _, _, window_len = line
        return rows > 0 and prefix + window_len > 0

    return [line for line in known if reads_something(line)]


@st.composite
def masks(draw):
    """Samples of any of these patterns, some without rows, their segments in any order, and keys that none reads."""
    found, key = [], 0
    for _ in range(draw(st.integers(1, 4))):
        given_ = lines(draw(LENGTHS), draw(LENGTHS), draw(st.integers(0, 5)))
        chosen = draw(st.lists(st.sampled_from(given_), max_size=4)) if given_ else []
        alone = mask_of([chosen])
        found += [(key, line) for line in chosen]
        key += alone.n_keys + draw(st.integers(0, 2))
    segments, row = [], 0
    for key_start, line in draw(st.permutations(found)):
        segments.append((row, line[0], key_start, *line[1:]))
        row += line[0]
    return SampleMask.build(segments, key)


def run(given_, d_o, mask, dropout_p=0.0):
    """o, lse, d_q, d_k, d_v."""
    leaves = [x.detach().requires_grad_() for x in given_]
    o, lse, _ = flash.attention(*leaves, *split(mask, CPU), dropout_p, SCALE)
    return [o.detach(), lse, *torch.autograd.grad(o, leaves, d_o)]


@given(mask=masks(), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_outputs_log_sums_and_gradients_are_the_definition_s(mask, seed):
    if not len(mask):
        return
    *given_, d_o = tensors(mask, HEADS, WIDTH, torch.float64, seed)
    right = exact(*(x.clone() for x in given_), d_o, mask, SCALE)
    unread = ~mask.materialise().any(dim=0)
    given_[1][unread], given_[2][unread] = torch.nan, torch.nan
    found = run(given_, d_o, mask)
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert all(torch.equal(a, b) for a, b in zip(found, run(given_, d_o, mask), strict=True))


@given(masks())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_pair_is_in_one_part(mask):
    if not len(mask):
        return
    found = torch.zeros(mask.n_rows, mask.n_keys, dtype=torch.int64)
    calls, _, _ = unpack(*split(mask, CPU))
    for call in calls:
        rows, keys = (
            index.long() if len(index) else torch.arange(size)
            for index, size in ((call.rows_P, mask.n_rows), (call.keys_P, mask.n_keys))
        )
        for of_rows, of_keys, visible in flash_definition.parts(call):
            found[rows[of_rows, None], keys[of_keys]] += visible
    assert torch.equal(found, mask.materialise().long())


def test_the_calls_of_janus():
    """Whole: NAR rows over visible and MASK, truths and queries over visible, its keys once. Causal: two parts each."""
    mask = mask_of([janus(5, 4), janus(3, 2)])
    (whole, causal_), rows, keys = unpack(*split(mask, CPU))
    assert whole.row_ends.tolist() == [0, 9, 17, 22, 26] and whole.key_ends.tolist() == [0, 9, 14, 19, 22]
    assert not len(whole.rows_P), "rows of the buffer as they are"
    assert causal_.row_ends.tolist() == causal_.key_ends.tolist() == [0, 4, 7, 11, 14, 16, 17, 19, 20]
    assert causal_.rows_P[:7].tolist() == [12, 11, 10, 9, 10, 11, 12]
    assert causal_.keys_P[:7].tolist() == [9, 8, 7, 6, 10, 11, 12]
    assert [len(layer.targets) for layer in rows] == [26, 12, 8] and len(keys) == 3


def test_what_needs_no_split_goes_to_the_library_as_it_is(monkeypatch):
    seen = []

    def watched(q, k, v, *rest):
        seen.append((q.data_ptr(), k.data_ptr(), v.data_ptr()))
        return flash_definition.forward(q, k, v, *rest)

    monkeypatch.setattr(flash, "varlen_forward", watched)
    for mask in (mask_of([causal(5, query=False)] * 2), mask_of([[(4, 3, 0, 0, 0, 0)], [(1, 6, 0, 0, 0, 0)]])):
        *given_, d_o = tensors(mask, HEADS, WIDTH, torch.float64)
        run(given_, d_o, mask)
        assert seen.pop() == tuple(x.data_ptr() for x in given_) and not seen
        assert unpack(*split(mask, CPU))[1:] == ([], [])


def test_dropout_is_the_same_in_forward_and_backward():
    mask = mask_of([janus(3, 4), causal(4)])
    given_ = [x.requires_grad_() for x in tensors(mask, 1, 2, torch.float64)[:3]]

    def drawn(*given_):
        torch.manual_seed(7)
        return flash.attend(*given_, mask, 0.4, SCALE)

    torch.autograd.gradcheck(drawn, given_)
    without = flash.attend(*given_, mask, 0.0, SCALE)
    torch.manual_seed(7)
    first, second = (flash.attend(*given_, mask, 0.4, SCALE) for _ in range(2))
    assert not torch.allclose(first, without) and not torch.allclose(first, second)
    with pytest.raises(ValueError, match=r"dropout_p must be 0 \.\. 1 without 1, got 1\.0"):
        flash.attend(*given_, mask, 1.0, SCALE)


def test_dropout_keeps_the_mean_over_merged_parts():
    mask = mask_of([[(60, 30, 0, 40, 1, 60)]])
    q, k, v, _ = tensors(mask, 1, 4, torch.float64)
    torch.manual_seed(0)
    out = flash.attend(0 * q, k, torch.ones_like(v), mask, 0.25, SCALE)
    # A row's mean of 90 weights, each 0 or 1 / 0.75, and every one with a draw of its own.
    assert abs(float(out.mean()) - 1) < 0.02
    assert abs(float(out[..., 0].std()) / (0.25 / 0.75 / 90) ** 0.5 - 1) < 0.3


def test_checkpointing_draws_again_what_it_drew():
    mask = mask_of([janus(3, 4)])
    *given_, d_o = tensors(mask, HEADS, WIDTH, torch.float64)
    leaves, found = [x.requires_grad_() for x in given_], []

    def attend(q, k, v):
        return flash.attend(q, k, v, mask, 0.3, SCALE)

    for call in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        torch.manual_seed(3)
        o = call(*leaves)
        found.append([o, *torch.autograd.grad(o, leaves, d_o)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_operators_are_well_formed():
    mask = mask_of([causal(3), janus(2, 2)])
    given_ = [x.requires_grad_() for x in tensors(mask, 1, 2, torch.float64)[:3]]
    torch.library.opcheck(torch.ops.parlance.library_attention.default, (*given_, *split(mask, CPU), 0.0, SCALE))


@pytest.mark.parametrize("line", [(3, 1, 2, 0, 0, 0), (2, 4, -1, 0, 0, 0), (4, 0, 0, 6, -2, 3)])
def test_a_segment_that_does_not_split_is_named(line):
    mask = mask_of([causal(4), [line]])
    q, k, v, _ = tensors(mask, 1, 4, torch.float64)
    with pytest.raises(ValueError, match=rf"move by 0 or 1 keys a row, got Segment\(row_start=8, rows={line[0]}, "):
        flash.attend(q, k, v, mask, 0.0, 1.0)


def test_the_backend_reaches_it(monkeypatch):
    monkeypatch.setattr(backend, "available_backends", lambda: ("torch", "library"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    mask = mask_of([causal(9), janus(4, 3)])
    *given_, _ = tensors(mask, 2, 8, torch.float16)
    right = sample_attention_reference(*(x.double() for x in given_), mask)
    calls = []
    monkeypatch.setattr(flash, "varlen_forward", lambda *x: calls.append(1) or flash_definition.forward(*x))
    for name in ("auto", "library"):
        calls.clear()
        found = sample_attention(*given_, mask, backend=name)
        assert len(calls) == 2 and float((found - right).abs().max()) < 2e-3
    op._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"torch.float32 with heads of 8 .*dense.*library takes .*multiple of 8 up to"):
        sample_attention(*(x.float() for x in given_), mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_attention(*(x.float() for x in given_), mask)

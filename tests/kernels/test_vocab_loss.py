"""The fused vocabulary loss equals the log-softmax chain: sums, gradients, any chunk, any number of streams."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parlance_kernels import vocab_loss
from parlance_kernels.vocab_loss.reference import vocab_loss_reference

PAIRS = {1: (), 2: ((0, 1),), 3: ((0, 2), (1, 2), (0, 1))}


def problem(tuples, streams, plain, vocab=13, width=5, dtype=torch.float64, seed=0, bias=True):
    make = torch.Generator().manual_seed(seed)
    rows = tuples * streams + plain

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype, generator=make).requires_grad_()

    tensors = [randn(rows, width), randn(vocab, width), randn(vocab) if bias else None]
    order = torch.randperm(rows, generator=make)
    integers = {
        "target_R": torch.randint(vocab, (rows,), generator=make),
        "term_R": torch.randint(3, (rows,), generator=make),
        "tuple_PK": order[: tuples * streams].view(tuples, streams),
    }
    scales = {
        "ce_scale": (0.3, 0.0, 1.7),
        "kl_pairs": PAIRS[streams],
        "kl_scale": tuple(0.4 + i for i in range(len(PAIRS[streams]))),
    }
    return tensors, {**integers, **scales}


def results(function, tensors, arguments, factor=1.0, **more):
    h, weight, bias = tensors
    total, ce, kl = function(h, weight, bias_V=bias, **arguments, **more)
    wanted = [t for t in tensors if t is not None]
    return [total.detach(), ce, kl, *torch.autograd.grad(total * factor, wanted)]


@given(
    st.integers(0, 5), st.sampled_from([1, 2, 3]), st.integers(0, 6), st.integers(1, 9),
    st.sampled_from([0.0, 0.1]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_equals_the_reference_in_float64(tuples, streams, plain, chunk, smoothing, bias, seed):
    tensors, arguments = problem(tuples, streams, plain, seed=seed, bias=bias)
    ours = results(vocab_loss, tensors, arguments, label_smoothing=smoothing, chunk_rows=chunk)
    theirs = results(vocab_loss_reference, tensors, arguments, label_smoothing=smoothing)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_upstream_factor_scales_the_gradient():
    tensors, arguments = problem(3, 3, 2)
    once, scaled = (results(vocab_loss, tensors, arguments, factor=f) for f in (1.0, 1024.0))
    for a, b in zip(once[3:], scaled[3:], strict=True):
        torch.testing.assert_close(1024.0 * a, b)


def test_equal_streams_have_no_divergence_and_no_divergence_gradient():
    tensors, arguments = problem(4, 2, 0)
    h = tensors[0].detach().clone()
    h[arguments["tuple_PK"][:, 1]] = h[arguments["tuple_PK"][:, 0]]
    h.requires_grad_()
    total, _, kl = vocab_loss(h, tensors[1], **{**arguments, "ce_scale": (0.0, 0.0, 0.0)})
    total.backward()
    assert abs(float(kl)) < 1e-12
    assert float(h.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_the_plain_computation(dtype):
    tensors, arguments = problem(6, 3, 5, vocab=101, width=33, bias=False)
    truth = results(vocab_loss_reference, tensors, arguments)
    low = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    plain = results(vocab_loss_reference, low, arguments)
    ours = results(vocab_loss, low, arguments)
    for exact, a, b in zip(truth, ours, plain, strict=True):
        allowed = 2 * (b.double() - exact).abs().max() + 2e-2 * exact.abs().max()
        assert (a.double() - exact).abs().max() <= allowed


def test_without_gradients_only_sums_are_made():
    tensors, arguments = problem(3, 3, 2)
    with torch.no_grad():
        total, ce, kl = vocab_loss(tensors[0], tensors[1], bias_V=tensors[2], **arguments)
    expected = results(vocab_loss_reference, tensors, arguments)
    for a, b in zip((total, ce, kl), expected, strict=False):
        torch.testing.assert_close(a, b)


def test_gradients_are_handed_over_once():
    tensors, arguments = problem(2, 3, 1)
    total, _, _ = vocab_loss(tensors[0], tensors[1], **arguments)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward must run once"):
        total.backward()

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


def relative(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


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


# ce_scale is the weight of a term over the tokens of a global batch; with the upstream factor, fp16's loss scale, the
# gradient is in fp16's range again.
@pytest.mark.parametrize(("ce_scale", "upstream"), [(1.0, 1.0), (1.6e-5, 65536.0), (1e-6, 65536.0), (1e-9, 2.0**30)])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_small_scales_survive_until_the_loss_scale_comes(dtype, allowed, ce_scale, upstream):
    tensors, arguments = problem(20, 3, 40, vocab=1009, width=33, bias=False)
    kl_scale = tuple(ce_scale * scale for scale in arguments["kl_scale"])
    arguments = {**arguments, "ce_scale": (ce_scale, 0.5 * ce_scale, 0.1 * ce_scale), "kl_scale": kl_scale}
    h, weight = tensors[0].detach(), 0.05 * tensors[1].detach()  # the rounding of large logits is not what is tested
    low = [h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), None]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in low]
    truth = results(vocab_loss_reference, exact, arguments, factor=upstream, label_smoothing=0.1)
    ours = results(vocab_loss, low, arguments, factor=upstream, label_smoothing=0.1)
    for a, b in zip(ours, truth, strict=True):
        assert relative(a, b) < allowed


def test_fp16_sums_do_not_overflow_where_every_row_pulls_the_same_way():
    # One target for all rows, wide states, pairs that contradict each other. Every logit is exact in fp16.
    make = torch.Generator().manual_seed(0)
    h_RD, weight_VD = 32 * torch.ones(288, 8), torch.randint(-3, 4, (50, 8), generator=make) / 4
    h_RD[1::2, :4] *= -1
    zeros_R, pairs = torch.zeros(288, dtype=torch.int64), torch.arange(288).view(144, 2)
    found = []
    for function, dtype in ((vocab_loss, torch.float16), (vocab_loss_reference, torch.float64)):
        given_ = [x.to(dtype).requires_grad_() for x in (h_RD, weight_VD)]
        total, _, _ = function(*given_, zeros_R, zeros_R, pairs, (1e-4,), kl_pairs=((0, 1),), kl_scale=(1e-4,))
        found.append([total.detach(), *torch.autograd.grad(total, given_)])
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-3


@given(
    st.integers(0, 3), st.sampled_from([1, 2, 3]), st.integers(0, 5), st.integers(2, 300), st.integers(1, 40),
    st.integers(1, 9), st.sampled_from([torch.float16, torch.bfloat16]), st.integers(-30, 6), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_low_precision_of_any_shape_and_scale(tuples, streams, plain, vocab, width, chunk, dtype, power, seed):
    tensors, arguments = problem(tuples, streams, plain, vocab=vocab, width=width, seed=seed)
    low = [(0.3 * t.detach()).to(dtype).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in low]
    truth = results(vocab_loss_reference, exact, arguments)
    chain = results(vocab_loss_reference, low, arguments)
    small = {name: tuple(2.0**power * s for s in arguments[name]) for name in ("ce_scale", "kl_scale")}
    ours = results(vocab_loss, low, {**arguments, **small}, factor=2.0**-power, chunk_rows=chunk)
    ours[0] = ours[0] * 2.0**-power
    for a, b, c in zip(ours, truth, chain, strict=True):
        allowed = 3 * (c - b).abs() + (2**-9 if dtype == torch.float16 else 2**-6) * (1 + b.abs())
        assert bool(((a - b).abs() <= allowed).all())


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

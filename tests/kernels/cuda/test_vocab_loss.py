"""The kernel of `vocab_loss` on the emulator against float64, and the operator around it against the reference."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parlance_kernels import backend, library, vocab_loss
from parlance_kernels.vocab_loss import cuda
from parlance_kernels.vocab_loss.chunked import Terms, lift_of
from parlance_kernels.vocab_loss.reference import vocab_loss_reference
from tests.kernels.cuda.emulation import emulated, guarded, untouched

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
PAIRS = {1: [], 2: [0.7], 3: [0.7, 0.0, 1.3]}  # scales of (0, 1), (0, 2), (1, 2)
COLUMNS = [(0, 1), (0, 2), (1, 2)]


def logits_of(tuples, streams, vocabulary, dtype, scale=3.0, seed=0):
    make = torch.Generator().manual_seed(seed)
    return (torch.randn(tuples, streams, vocabulary, generator=make) * scale).to(dtype)


def run(logits, target, term, ce_scale, pairs, smoothing=0.0, write=True, reverse=False, padding=3, threads=64):
    """Losses of rows, divergences of tuples, and what stands in the place of the logits, `padding` columns included."""
    tuples, streams, vocabulary = logits.shape
    stride = -(-(vocabulary + padding) // 8) * 8
    wide = torch.full((tuples, streams, stride), torch.nan, dtype=logits.dtype)
    wide[..., :vocabulary] = logits
    inside, around = guarded(wide)
    ce, around_ce = guarded(torch.zeros(tuples, streams))
    kl, around_kl = guarded(torch.zeros(tuples, streams * (streams - 1) // 2))
    sizes = tuples, streams, vocabulary, stride, len(ce_scale), int(write), threads, library.dtype_code(logits)
    with emulated(reverse):
        scales = cuda._doubles(ce_scale), cuda._doubles(pairs)
        library.call("parlance_vocab_loss", inside, target, term, *scales, ce, kl, *sizes, float(smoothing))
    assert all(untouched(x) for x in (around, around_ce, around_kl))
    if not write:
        torch.testing.assert_close(inside, wide, rtol=0, atol=0, equal_nan=True)
    return ce, kl, inside


def truth(logits, target, term, ce_scale, pairs, smoothing=0.0):
    """The same by autograd in float64, of the logits as they are stored."""
    z = logits.double().requires_grad_()
    logp = z.log_softmax(dim=2)
    ce = -(1 - smoothing) * logp.gather(2, target[..., None]).squeeze(2)
    if smoothing:
        ce = ce - smoothing * logp.mean(dim=2)
    both = [
        ((logp[:, a].exp() - logp[:, b].exp()) * (logp[:, a] - logp[:, b])).sum(dim=1) for a, b in COLUMNS[: len(pairs)]
    ]
    kl = 0.5 * torch.stack(both, dim=1) if both else torch.zeros(len(logits), 0, dtype=torch.float64)
    total = (ce * torch.tensor(ce_scale, dtype=torch.float64)[term]).sum() + (kl * torch.tensor(pairs).double()).sum()
    return ce.detach(), kl.detach(), torch.autograd.grad(total, z)[0]


def case(tuples, streams, vocabulary, dtype, scale=3.0, seed=0):
    make = torch.Generator().manual_seed(seed)
    logits = logits_of(tuples, streams, vocabulary, dtype, scale, seed)
    target, term = (torch.randint(n, (tuples, streams), generator=make) for n in (vocabulary, 3))
    return logits, target, term, [0.3, 0.0, 1.7], PAIRS[streams]


def close(found, exact, dtype, vocabulary, far=1.0):
    """far: the largest logit; a divergence of that size is only known to so many digits."""
    ce, kl, wide = found
    torch.testing.assert_close(ce.double(), exact[0], rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(kl.double(), exact[1], rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(
        wide[..., :vocabulary].double(), exact[2], rtol=2 * ROUNDING[dtype], atol=1e-6 * (1 + far / 5)
    )
    assert not wide[..., vocabulary:].any()  # NaN before, zeros for the products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_equals_the_definition(streams, dtype):
    for number, (tuples, vocabulary) in enumerate([(0, 7), (1, 1), (2, 7), (1, 65), (2, 513), (1, 1024)]):
        smoothing, reverse = (0.0, 0.1)[number % 2], number % 2 == 0
        given_ = case(tuples, streams, vocabulary, dtype, seed=vocabulary)
        found = run(*given_, smoothing, reverse=reverse, padding=number, threads=32 if vocabulary < 99 else 96)
        close(found, truth(*given_, smoothing), dtype, vocabulary)


@pytest.mark.parametrize("streams", [1, 3])
def test_sums_alone_leave_the_logits(streams):
    given_ = case(2, streams, 71, torch.bfloat16)
    with_gradients, without = run(*given_, 0.1), run(*given_, 0.1, write=False)
    for ours, theirs in zip(with_gradients[:2], without[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_twice_and_in_either_order_the_same_bits():
    given_ = case(3, 3, 333, torch.float16)
    first, again, backward = (run(*given_, 0.1, reverse=reverse) for reverse in (False, False, True))
    for other in (again, backward):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_streams_have_no_divergence_and_no_gradient_of_it(dtype):
    logits = logits_of(2, 1, 300, dtype, scale=9.0).expand(2, 3, 300).contiguous()
    target, term = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    _, kl, wide = run(logits, target, term, [0.0], PAIRS[3])
    assert not kl.any()
    assert not wide.any()


def test_a_term_of_scale_0_has_a_loss_and_no_gradient():
    logits, target, term, _, _ = case(3, 1, 77, torch.bfloat16)
    ce, _, wide = run(logits, target, torch.ones_like(term), [1.0, 0.0], [])
    assert (ce > 0).all()
    assert not wide.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_logits_and_ties(dtype):
    far = logits_of(2, 3, 201, dtype, scale=6000.0).clamp(-60000, 60000)
    target, term = torch.tensor([[0, 5, 200]] * 2), torch.zeros(2, 3, dtype=torch.int64)
    for logits in (far, torch.full_like(far, 40000.0), torch.zeros_like(far)):
        given_ = logits, target, term, [1.0], PAIRS[3]
        close(run(*given_, 0.1), truth(*given_, 0.1), dtype, 201, far=float(logits.abs().max()))


def test_hidden_tokens_have_no_weight():
    logits, target, term, scale, pairs = case(2, 1, 90, torch.float32)
    logits[..., 10:40], target[:] = -torch.inf, 50
    found, exact = run(logits, target, term, scale, pairs), truth(logits, target, term, scale, pairs)
    assert not found[2][..., 10:40].any()
    close(found, exact, torch.float32, 90)


@pytest.mark.parametrize(("target", "term"), [(-1, 0), (20, 0), (3, 2), (3, -1)])
def test_what_does_not_exist_spoils_the_loss_and_reads_nothing(target, term):
    logits = logits_of(1, 1, 20, torch.float32)
    targets, terms = (torch.tensor([[x]]) for x in (target, term))
    ce, _, _ = run(logits, targets, terms, [1.0, 1.0], [])
    assert ce.isnan().all()
    h, weight = torch.randn(2, 8), torch.randn(20, 8)
    with emulated():
        made = cuda.loss_cuda(
            h, weight, None, torch.tensor([1, target]), torch.tensor([0, term]), torch.empty(0, 1, dtype=torch.int64),
            [1.0, 1.0], [], [], 0.0, 8, False, False,
        )  # fmt: skip
    assert made[0].isnan()


def test_a_launcher_refuses_what_it_cannot_do():
    x = torch.zeros(4, 1, 8)
    index = torch.zeros(4, 1, dtype=torch.int64)
    doubles = (ctypes.c_double * 20)()
    right = {"tuples": 4, "streams": 1, "vocabulary": 8, "stride": 8, "terms": 1, "write": 1, "threads": 64, "dtype": 0}
    for wrong in ({"streams": 4}, {"streams": 0}, {"stride": 7}, {"vocabulary": 9}, {"terms": 17}, {"threads": 48},
                  {"threads": 2048}, {"dtype": 5}):  # fmt: skip
        with emulated(), pytest.raises(library.KernelError, match=r"\(CUDA error 1\)"):
            sizes = {**right, **wrong}.values()
            library.call("parlance_vocab_loss", x, index, index, doubles, doubles, x, None, *sizes, 0.0)


def problem(tuples, streams, plain, vocabulary, width, dtype, bias, seed):
    make = torch.Generator().manual_seed(seed)
    rows = tuples * streams + plain
    h, weight = (torch.randn(n, width, generator=make).mul(0.5).to(dtype) for n in (rows, vocabulary))
    bias = torch.randn(vocabulary, generator=make).to(dtype) if bias else None
    order = torch.randperm(rows, generator=make)
    pairs = {1: (), 2: ((1, 0),), 3: ((0, 2), (1, 2), (0, 1))}[streams]
    return (h, weight, bias), {
        "target_R": torch.randint(vocabulary, (rows,), generator=make),
        "term_R": torch.randint(3, (rows,), generator=make),
        "tuple_PK": order[: tuples * streams].view(tuples, streams),
        "ce_scale": (0.3, 0.0, 1.7),
        "kl_pairs": pairs,
        "kl_scale": tuple(0.4 + i for i in range(len(pairs))),
    }


def by_kernel(tensors, arguments, smoothing=0.0, chunk=2, factor=1.0):
    """Total, sums and gradients by the functions that the operator registers for a GPU."""
    h, weight, bias = tensors
    terms = Terms(*(arguments[name] for name in ("ce_scale", "kl_pairs", "kl_scale")), smoothing, chunk)
    flat = [stream for pair in terms.kl_pairs for stream in pair]
    index = (arguments[name] for name in ("target_R", "term_R", "tuple_PK"))
    with emulated():
        made = cuda.loss_cuda(
            h,
            weight,
            bias,
            *index,
            list(terms.ce_scale),
            flat,
            list(terms.kl_scale),
            smoothing,
            chunk,
            True,
            bias is not None,
        )
    lift = lift_of(terms, h.dtype)
    scaled = cuda.times_upstream(*made[3:], torch.tensor(factor), lift, h.dtype, h.dtype)
    return [*made[:3], *scaled[: 2 + (bias is not None)]]


def by_definition(tensors, arguments, smoothing=0.0, factor=1.0):
    exact = [None if x is None else x.double().requires_grad_() for x in tensors]
    total, ce, kl = vocab_loss_reference(*exact[:2], bias_V=exact[2], label_smoothing=smoothing, **arguments)
    wanted = [x for x in exact if x is not None]
    return [total.detach(), ce, kl, *torch.autograd.grad(total * factor, wanted, allow_unused=True)]


@given(
    st.integers(0, 3), st.sampled_from([1, 2, 3]), st.integers(0, 4), st.sampled_from([2, 7, 16, 65]),
    st.integers(1, 7), st.sampled_from(DTYPES), st.booleans(), st.sampled_from([0.0, 0.1]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_the_operator_equals_the_reference(tuples, streams, plain, vocabulary, chunk, dtype, bias, smoothing, seed):
    tensors, arguments = problem(tuples, streams, plain, vocabulary, 9, dtype, bias, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "THREADS", 32)
        found = by_kernel(tensors, arguments, smoothing, chunk)
    allowed = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for ours, exact in zip(found, by_definition(tensors, arguments, smoothing), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(
            ours.double(), exact, rtol=allowed, atol=allowed * (1 + float(exact.abs().sum()) ** 0.5)
        )


@pytest.mark.parametrize(("scale", "upstream"), [(1.6e-5, 65536.0), (1e-9, 2.0**30)])
def test_small_scales_survive_fp16(scale, upstream):
    tensors, arguments = problem(3, 3, 4, 65, 16, torch.float16, False, 0)
    for name in ("ce_scale", "kl_scale"):
        arguments[name] = tuple(scale * x for x in arguments[name])
    found = by_kernel(tensors, arguments, 0.1, 8, upstream)
    for ours, exact in zip(found, by_definition(tensors, arguments, 0.1, upstream), strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < 3e-3


def test_without_gradients_there_are_none():
    (h, weight, _), arguments = problem(2, 3, 1, 20, 8, torch.float32, False, 0)
    index = [arguments[name] for name in ("target_R", "term_R", "tuple_PK")]
    flat = [0, 2, 1, 2, 0, 1]
    with emulated():
        made = cuda.loss_cuda(h, weight, None, *index, [0.3, 0.0, 1.7], flat, [0.4, 1.4, 2.4], 0.0, 4, False, False)
    exact = by_definition((h, weight, None), arguments)
    for ours, right in zip(made[:3], exact[:3], strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)
    assert [x.numel() for x in made[3:]] == [0, 0, 0]


def test_the_weights_gradient_is_summed_in_fp32_where_a_product_can_give_it():
    shapes = ((64, 16), torch.float32), ((5, 64), torch.bfloat16), ((5, 16), torch.bfloat16)
    sums, g, h = (torch.empty(*shape, dtype=dtype, device="meta") for shape, dtype in shapes)
    with torch.profiler.profile() as profile:
        cuda._add_product(sums, g, h, 1.0)
    assert "aten::addmm" in {event.name for event in profile.events()}


def operator_arguments(dtype, with_grad, with_bias=False):
    tensors, arguments = problem(2, 3, 2, 11, 4, dtype, with_bias, 0)
    tensors = [x if x is None else x.requires_grad_(with_grad) for x in tensors]
    index = [arguments[name] for name in ("target_R", "term_R", "tuple_PK")]
    return (*tensors, *index, [0.3, 0.0, 1.7], [0, 2, 1, 2, 0, 1], [0.4, 1.4, 2.4], 0.1, 4, with_grad, with_bias)


def test_the_operator_is_well_formed():
    for dtype, with_grad, with_bias in (
        (torch.float32, True, True),
        (torch.bfloat16, True, False),
        (torch.float32, False, False),
    ):
        torch.library.opcheck(torch.ops.parlance.vocab_loss.default, operator_arguments(dtype, with_grad, with_bias))
    scaled = torch.randn(3, 4), torch.randn(5, 4), torch.empty(0), torch.tensor(2.0), 4.0, torch.bfloat16, torch.float32
    torch.library.opcheck(torch.ops.parlance.vocab_loss_backward.default, scaled)


@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_has_the_gradients_of_the_torch_backend(monkeypatch, bias):
    monkeypatch.setattr(backend, "available_backends", lambda: ("torch", "cuda"))
    found = []
    for name in ("torch", "cuda"):
        tensors, arguments = problem(2, 3, 3, 13, 5, torch.float64, bias, 1)
        wanted = [x.requires_grad_() for x in tensors if x is not None]
        total, ce, kl = vocab_loss(*tensors[:2], bias_V=tensors[2], backend=name, label_smoothing=0.1, **arguments)
        assert not ce.requires_grad and not kl.requires_grad
        found.append([total.detach(), ce, kl, *torch.autograd.grad(1024 * total, wanted)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_go_only_where_they_are_wanted(monkeypatch):
    monkeypatch.setattr(backend, "available_backends", lambda: ("torch", "cuda"))
    (h, weight, bias), arguments = problem(1, 2, 1, 13, 5, torch.float32, True, 1)
    vocab_loss(h.requires_grad_(), weight, bias_V=bias, backend="cuda", **arguments)[0].backward()
    assert h.grad is not None and weight.grad is None and bias.grad is None
    with torch.no_grad():
        assert not vocab_loss(h, weight, bias_V=bias, backend="cuda", **arguments)[0].requires_grad


def test_the_kernel_says_what_it_does_not_take():
    (h, weight, _), arguments = problem(1, 3, 0, 13, 5, torch.float32, False, 1)
    index = [arguments[name] for name in ("target_R", "term_R", "tuple_PK")]
    rest = 0.0, 4, True, False
    for given_, message in (
        ((h.double(), weight, None, *index, [1.0], [], [], *rest), "float32, float16 or bfloat16, got float64"),
        ((h, weight.half(), None, *index, [1.0], [], [], *rest), "weight must be torch.float32 as the states are"),
        ((h, weight, None, index[0].int(), *index[1:], [1.0], [], [], *rest), "targets must be torch.int64"),
        ((h, weight, None, *index, [1.0] * 17, [], [], *rest), "at most 16 cross-entropy terms, got 17"),
        ((h, weight, None, *index, [1.0], [0, 1] * 17, [1.0] * 17, *rest), "at most 16 pairs of streams, got 17"),
        ((h, weight, None, *index[:2], torch.zeros(1, 4, dtype=torch.int64), [1.0], [0, 3], [1.0], *rest),
         "at most 3 streams in a tuple, got 4"),
    ):  # fmt: skip
        with emulated(), pytest.raises(ValueError, match=message):
            cuda.loss_cuda(*given_)

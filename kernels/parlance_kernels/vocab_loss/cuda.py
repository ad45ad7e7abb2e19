"""`vocab_loss` as a PyTorch operator: a CUDA kernel between cuBLAS products on a GPU, PyTorch by chunks on a CPU.

The operator returns the loss and its gradients, made at the same time; autograd only multiplies by the upstream factor.

Shapes: R rows, N rows of a chunk, D width, V vocabulary, W columns of the logits' buffer (V, or V padded so that rows
begin on 128 bytes), T cross-entropy terms, P tuples, K streams in a tuple, Q stream pairs.
"""

import ctypes
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from parlance_kernels import library
from parlance_kernels.exit_copy.active_rows import compact_cuda
from parlance_kernels.vocab_loss.chunked import Given, Terms, accumulate, lift_of, shrink_of

# The gradient of the weight is read and written once a chunk, 8 bytes a weight: rows enough to make that little.
CHUNK_ROWS = 4096
THREADS = 512  # of a block, which has a tuple
MOST_STREAMS, MOST_TERMS, MOST_PAIRS = 3, 16, 16
# Lengths that products read 16 bytes at a time; others are padded to the next of the second.
ALIGNED, PADDED = 8, 64
Made = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Asked(NamedTuple):
    """The operator's arguments, which torch wants one by one. with_grad, with_bias: which gradients are to be made."""

    given: Given
    terms: Terms
    with_grad: bool
    with_bias: bool

    def flat(self) -> tuple[Any, ...]:
        """As `loss_torch` has them; a part of the vocabulary is not for the operator."""
        ce_scale, kl_pairs, kl_scale, smoothing, chunk_rows, _ = self.terms
        scales = list(ce_scale), [stream for pair in kl_pairs for stream in pair], list(kl_scale)
        return *self.given, *scales, smoothing, chunk_rows, self.with_grad, self.with_bias

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "Asked":
        """From what `flat` made."""
        ce_scale, kl_pairs, kl_scale, smoothing, chunk_rows, with_grad, with_bias = arguments[len(Given._fields) :]
        pairs = tuple(zip(kl_pairs[::2], kl_pairs[1::2], strict=True))
        terms = Terms(tuple(ce_scale), pairs, tuple(kl_scale), smoothing, chunk_rows)
        return cls(Given(*arguments[: len(Given._fields)]), terms, with_grad, with_bias)


def vocab_loss_op(given: Given, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """`vocab_loss` by the operator."""
    with_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given[:3])
    with_bias = with_grad and given.bias_V is not None and given.bias_V.requires_grad
    made = loss(*Asked(given, terms, with_grad, with_bias).flat())
    return made[0], made[1], made[2]


def loss_torch(
    h_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_R: Tensor, term_R: Tensor, tuple_PK: Tensor,
    ce_scale: list[float], kl_pairs: list[int], kl_scale: list[float], smoothing: float, chunk_rows: int,
    with_grad: bool, with_bias: bool,
) -> Made:  # fmt: skip
    """Loss, sums of its terms, and `lift` times its gradients of h, weight and bias, empty where not asked for."""
    given = Given(h_RD.contiguous(), weight_VD, bias_V, target_R, term_R, tuple_PK)
    numbers = ce_scale, kl_pairs, kl_scale, smoothing, chunk_rows, with_grad, with_bias
    work = accumulate(given, Asked.of((*given, *numbers)).terms, with_grad)
    dh_RD, dweight_VD, dbias_V = _nothing(h_RD)
    if work.dh_RD is not None and work.dweight_VD is not None:
        dh_RD, dweight_VD = work.dh_RD, work.dweight_VD
    if with_bias and work.dbias_V is not None:
        dbias_V = work.dbias_V
    return work.total(), work.ce_T, work.kl_Q, dh_RD, dweight_VD, dbias_V


def loss_cuda(*arguments: Any) -> Made:
    """The same, of the same arguments, with one kernel between the products of a chunk. bf16, fp16 or fp32.

    A target or term that does not exist makes the loss NaN: to ask for it would make the host wait.

    Raises:
        ValueError: another dtype, or more streams, terms or pairs than the kernel takes.
    """
    given, terms, with_grad, with_bias = Asked.of(arguments)
    _check(given, terms)
    h_RD, weight_VD, bias_V, target_R, term_R, tuple_PK = given
    chunk_rows = terms.chunk_rows
    rows, vocabulary = len(h_RD), len(weight_VD)
    lift, tuples, streams = lift_of(terms, h_RD.dtype), 0, 1
    if terms.kl_pairs:
        tuples, streams = tuple_PK.shape
    order_R = _tuples_first(rows, tuple_PK) if tuples else None
    target_R, term_R, h_sorted_RD = (
        x.contiguous() if order_R is None else x.index_select(0, order_R) for x in (target_R, term_R, h_RD)
    )
    weight_WD, bias_W = _padded(weight_VD), None if bias_V is None else _padded(bias_V.to(h_RD.dtype))
    logits_NW = h_RD.new_empty(min(rows, max(chunk_rows, streams)), len(weight_WD))
    ce_R = h_RD.new_empty(rows, dtype=torch.float32)
    kl_PQ = ce_R.new_empty(tuples, streams * (streams - 1) // 2)
    dh_RD, dweight_WD, dbias_V = _nothing(h_RD)
    if with_grad:
        dh_RD, dweight_WD = torch.empty_like(h_sorted_RD), ce_R.new_zeros(weight_WD.shape)
    if with_bias:
        dbias_V = ce_R.new_zeros(vocabulary)

    scales = _doubles([lift * s for s in terms.ce_scale]), _doubles(_pair_scales(terms, lift))
    for begin, end, k in _chunks(rows, tuples, streams, chunk_rows):
        g_NW = logits_NW[: end - begin]
        if bias_W is None:
            torch.mm(h_sorted_RD[begin:end], weight_WD.T, out=g_NW)
        else:
            torch.addmm(bias_W, h_sorted_RD[begin:end], weight_WD.T, out=g_NW)
        kl = kl_PQ[begin // k : end // k] if k > 1 else None
        sizes = (end - begin) // k, k, vocabulary, len(weight_WD), len(terms.ce_scale), int(with_grad), THREADS
        library.call(
            "parlance_vocab_loss", g_NW, target_R[begin:end], term_R[begin:end], *scales, ce_R[begin:end], kl, *sizes,
            library.dtype_code(h_RD), float(terms.label_smoothing),
        )  # fmt: skip
        if with_grad:
            torch.mm(g_NW, weight_WD, out=dh_RD[begin:end])
            _add_product(dweight_WD, g_NW, h_sorted_RD[begin:end], shrink_of(chunk_rows, h_RD.dtype))
        if with_bias:
            dbias_V += g_NW[:, :vocabulary].sum(dim=0, dtype=torch.float32)

    total, sums = _sums(ce_R, term_R, kl_PQ, terms)
    if with_grad and order_R is not None:
        dh_RD = torch.empty_like(dh_RD).index_copy_(0, order_R, dh_RD)
    ce_T, kl_Q = (x.clone() for x in sums.split([len(terms.ce_scale), len(terms.kl_scale)]))
    return total, ce_T, kl_Q, dh_RD, dweight_WD[:vocabulary], dbias_V


def _nothing(h_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, weight and bias that nobody asked for."""
    wide = torch.promote_types(h_RD.dtype, torch.float32)
    return h_RD.new_empty(0), h_RD.new_empty(0, dtype=wide), h_RD.new_empty(0, dtype=wide)


def _check(given: Given, terms: Terms) -> None:
    h_RD, weight_VD, _, target_R, term_R, tuple_PK = given
    library.dtype_code(h_RD)
    for name, x in (("targets", target_R), ("terms", term_R), ("tuples", tuple_PK)):
        if x.dtype != torch.int64:
            raise ValueError(f"vocab_loss: {name} must be torch.int64, got {x.dtype}")
    if weight_VD.dtype != h_RD.dtype:
        raise ValueError(f"vocab_loss: weight must be {h_RD.dtype} as the states are, got {weight_VD.dtype}")
    streams = tuple_PK.shape[1] if terms.kl_pairs else 1
    for name, count, most in (
        ("streams in a tuple", streams, MOST_STREAMS),
        ("cross-entropy terms", len(terms.ce_scale), MOST_TERMS),
        ("pairs of streams", len(terms.kl_pairs), MOST_PAIRS),
    ):
        if count > most:
            raise ValueError(f"vocab_loss: the CUDA kernel takes at most {most} {name}, got {count}")


def _tuples_first(rows: int, tuple_PK: Tensor) -> Tensor:
    """All rows, those of tuples first and tuple by tuple. Their number is known without asking the device."""
    plain_R = torch.ones(rows, dtype=torch.bool, device=tuple_PK.device).index_fill_(0, tuple_PK.reshape(-1), False)
    others_R, _ = compact_cuda(plain_R)
    return torch.cat([tuple_PK.reshape(-1), others_R[: rows - tuple_PK.numel()]])


def padding(vocabulary: int) -> int:
    """Columns that `_padded` adds."""
    return -vocabulary % PADDED if vocabulary % ALIGNED else 0


def _padded(x: Tensor) -> Tensor:
    """Zeros behind the vocabulary where its length would keep products from reading 16 bytes at a time."""
    more = padding(len(x))
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, more)) if more else x.contiguous()


def _chunks(rows: int, tuples: int, streams: int, chunk_rows: int) -> Iterator[tuple[int, int, int]]:
    """First row, row behind the last, and rows of a tuple: whole tuples, then rows by themselves."""
    paired, step = tuples * streams, max(1, chunk_rows // streams) * streams
    for begin in range(0, paired, step):
        yield begin, min(paired, begin + step), streams
    for begin in range(paired, rows, chunk_rows):
        yield begin, min(rows, begin + chunk_rows), 1


def _column(a: int, b: int) -> int:
    """The kernel's place for a pair of streams, -1 for a stream with itself, which has no divergence."""
    low, high = sorted((a, b))
    return high * (high - 1) // 2 + low if low < high else -1


def _pair_scales(terms: Terms, lift: float) -> list[float]:
    """`lift` times the scale of every two streams, in the order of their columns."""
    made = [0.0] * len(list(combinations(range(MOST_STREAMS), 2)))
    for pair, scale in zip(terms.kl_pairs, terms.kl_scale, strict=True):
        if _column(*pair) >= 0:
            made[_column(*pair)] += lift * scale
    return made


def _doubles(numbers: Sequence[float]) -> "ctypes.Array[Any]":
    return (ctypes.c_double * len(numbers))(*numbers)


def _add_product(dweight_WD: Tensor, g_NW: Tensor, h_ND: Tensor, shrink: float) -> None:
    """dweight += g^T h, summed in fp32; where a product cannot give fp32, as `Accumulator` does."""
    if g_NW.dtype == dweight_WD.dtype:
        dweight_WD.addmm_(g_NW.T, h_ND)
    elif dweight_WD.device.type != "cpu" and "dtype_out" in torch.ops.aten.addmm.overloads():
        torch.ops.aten.addmm.dtype_out(dweight_WD, g_NW.T, h_ND, torch.float32, out=dweight_WD)
    elif shrink == 1.0:
        dweight_WD += g_NW.T @ h_ND
    else:
        dweight_WD.add_(g_NW.T @ (h_ND * shrink), alpha=1.0 / shrink)


def _sums(ce_R: Tensor, term_R: Tensor, kl_PQ: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Scaled total, and the sums of all terms, then of all pairs. One order of adding, whatever the device does."""
    n_terms, n_pairs = len(terms.ce_scale), len(terms.kl_pairs)
    sums, total = ce_R.new_zeros(n_terms + n_pairs), ce_R.new_zeros(())
    columns = (ctypes.c_int64 * n_pairs)(*(_column(*pair) for pair in terms.kl_pairs))
    sizes = len(ce_R), *kl_PQ.shape, n_terms, n_pairs
    scales = _doubles([*terms.ce_scale, *terms.kl_scale])
    library.call("parlance_vocab_loss_sums", ce_R, term_R, kl_PQ, scales, columns, sums, total, *sizes)
    return total, sums


def _made_like(*arguments: Any) -> Made:
    (h_RD, weight_VD, *_), terms, with_grad, with_bias = Asked.of(arguments)
    wide = torch.promote_types(h_RD.dtype, torch.float32)
    shapes = (), len(terms.ce_scale), len(terms.kl_scale)
    total, ce_T, kl_Q = (h_RD.new_empty(shape, dtype=wide) for shape in shapes)
    dh_RD = h_RD.new_empty(h_RD.shape if with_grad else 0)
    dweight_VD = h_RD.new_empty(weight_VD.shape if with_grad else 0, dtype=wide)
    return total, ce_T, kl_Q, dh_RD, dweight_VD, h_RD.new_empty(len(weight_VD) if with_bias else 0, dtype=wide)


loss = torch.library.custom_op("parlance::vocab_loss", loss_torch, mutates_args=(), device_types="cpu")
loss.register_kernel("cuda", loss_cuda)
loss.register_fake(_made_like)


def times_upstream(
    dh_RD: Tensor, dweight_VD: Tensor, dbias_V: Tensor, factor: Tensor, lift: float, low: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients times factor / lift, multiplied in the factor's precision, which fp16 could not hold."""
    made = _scaled_like(dh_RD, dweight_VD, dbias_V, factor, lift, low, bias_dtype)
    for stored, out in zip((dh_RD, dweight_VD, dbias_V), made, strict=True):
        torch.mul(stored.to(factor.dtype), factor / lift, out=out)
    return made


def _scaled_like(
    dh_RD: Tensor, dweight_VD: Tensor, dbias_V: Tensor, factor: Tensor, lift: float, low: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dh_low_RD, dweight_low_VD = (x.new_empty(x.shape, dtype=low) for x in (dh_RD, dweight_VD))
    return dh_low_RD, dweight_low_VD, dbias_V.new_empty(dbias_V.shape, dtype=bias_dtype)


loss_backward = torch.library.custom_op("parlance::vocab_loss_backward", times_upstream, mutates_args=())
loss_backward.register_fake(_scaled_like)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Made) -> None:
    (h_RD, _, bias_V, *_), terms, ctx.with_grad, _ = Asked.of(inputs)
    ctx.lift = lift_of(terms, h_RD.dtype)
    ctx.dtypes = h_RD.dtype, h_RD.dtype if bias_V is None else bias_V.dtype
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_total: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if not ctx.with_grad:
        raise RuntimeError("vocab_loss: the operator was called without `with_grad`, so it has made no gradients")
    made = loss_backward(*ctx.saved_tensors, d_total, ctx.lift, *ctx.dtypes)
    wanted = [grad if needed else None for grad, needed in zip(made, ctx.needs_input_grad, strict=False)]
    return (*wanted, *[None] * 10)


loss.register_autograd(_differentiate, setup_context=_remember)

"""The fused vocabulary loss in PyTorch: projection, cross-entropy and symmetric KL by chunks, with their gradients.

The scale of every term is known before the forward (counts come from the batch), so the gradient of the logits
can be formed while a chunk is at hand and the logits of the whole batch never exist. For a pair of
distributions p, q with log-probabilities a, b and d = a - b:

    J = KL(p||q) + KL(q||p) = E_p[d] - E_q[d]
    dJ/da = p (d - E_p[d]) + p - q          dJ/db = -q (d - E_q[d]) - p + q

so K streams that are compared pairwise need, per row, the K x K matrix H = p log(p)^T and two K x K mixes.

The scales are means over a large batch, so in fp16 most gradients would round to zero before a loss scale could lift
them. There every scale is multiplied by a power of two (`lift`) that brings the largest to LARGEST_FP16; sums and
stored gradients stay lifted, and the backward divides by it in fp32, together with the upstream factor.

Where ranks have a part of the vocabulary each, maxima, sums of exponentials, logits of targets and the matrices H are
reduced over them; each makes the gradient of its part of the weight, and the gradient of the rows is a sum over ranks.

Shapes: R rows, D width, V vocabulary (this rank's part of it), T cross-entropy terms, P tuples, K streams in a tuple,
Q stream pairs, C tuples in a chunk, N rows of a chunk.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parlance_kernels.vocab_part import VocabPart

CHUNK_ROWS = 288
# The largest scale after the lift: fp16 then keeps probabilities down to 4e-9, and a KL between distributions that
# contradict each other has a factor of thousands left until 65504.
LARGEST_FP16 = 16.0


class Terms(NamedTuple):
    """The numbers of one call, as `vocab_loss` takes them."""

    ce_scale: tuple[float, ...]
    kl_pairs: tuple[tuple[int, int], ...]
    kl_scale: tuple[float, ...]
    label_smoothing: float
    chunk_rows: int
    part: VocabPart | None = None


class Given(NamedTuple):
    """The tensors of one call, as `vocab_loss` takes them."""

    h_RD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    target_R: Tensor
    term_R: Tensor
    tuple_PK: Tensor


class VocabLoss(torch.autograd.Function):
    """The loss whose forward makes its gradients."""

    @staticmethod
    def forward(ctx: Any, terms: Terms, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """tensors: those of `Given`, one by one, as autograd wants them."""
        work = accumulate(Given(*tensors), terms, any(ctx.needs_input_grad))  # type: ignore[arg-type]
        # Not save_for_backward: these are results, to be scaled in place and handed over without a second copy.
        ctx.made, ctx.lift = work.gradients(), work.lift
        ctx.mark_non_differentiable(work.ce_T, work.kl_Q)
        return work.total(), work.ce_T, work.kl_Q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The upstream factor (1, or a dynamic loss scale) multiplies what the forward made."""
        made, ctx.made = ctx.made, None
        if made is None:
            raise RuntimeError("vocab_loss: backward must run once, its gradients are already handed over")
        factor = grads[0] / ctx.lift
        # In the precision of the factor, which fp16 could not hold; autograd rounds the product to what the input has.
        scaled = [None if grad is None else grad.to(factor.dtype).mul_(factor) for grad in made]
        wanted = [grad if needed else None for grad, needed in zip(scaled, ctx.needs_input_grad[1:], strict=False)]
        return (None, *wanted, None, None, None)


def accumulate(given: Given, terms: Terms, with_grad: bool) -> "Accumulator":
    """Goes through all tuples, then through all rows that are in none."""
    work, tuple_PK = Accumulator(given, terms, with_grad), given.tuple_PK
    streams = tuple_PK.shape[1] if tuple_PK.numel() else 1
    plain_R = torch.ones(len(given.h_RD), dtype=torch.bool, device=given.h_RD.device)
    plain_R[tuple_PK.reshape(-1)] = False
    if tuple_PK.numel():
        for rows_CK in tuple_PK.split(max(1, terms.chunk_rows // streams)):
            work.add(rows_CK, terms.kl_pairs)
    for rows_C in plain_R.nonzero().squeeze(1).split(terms.chunk_rows):
        work.add(rows_C[:, None], ())
    return work


class Accumulator:
    """Sums and gradients over the chunks of one call."""

    def __init__(self, given: Given, terms: Terms, with_grad: bool) -> None:
        self.given, self.terms = given, terms
        h_RD, weight_VD, bias_V = given[:3]
        half = h_RD.dtype in (torch.float16, torch.bfloat16)
        self.dtype = torch.float32 if half else h_RD.dtype
        self.whole = len(weight_VD) if terms.part is None else terms.part.whole
        self.lift = lift_of(terms, h_RD.dtype)
        self.shrink = shrink_of(terms.chunk_rows, h_RD.dtype)
        self.ce_scale_T = torch.tensor([s * self.lift for s in terms.ce_scale], dtype=self.dtype, device=h_RD.device)
        self.kl_scale = [s * self.lift for s in terms.kl_scale]
        self.ce_T = torch.zeros_like(self.ce_scale_T)
        self.kl_Q = self.ce_T.new_zeros(len(terms.kl_pairs))
        self.dh_RD = torch.zeros_like(h_RD) if with_grad else None
        self.dweight_VD = torch.zeros_like(weight_VD, dtype=self.dtype) if with_grad else None
        self.dbias_V = torch.zeros_like(bias_V, dtype=self.dtype) if with_grad and bias_V is not None else None

    def total(self) -> Tensor:
        """The scaled sum of all terms."""
        ce_T, kl_Q, terms = self.ce_T, self.kl_Q, self.terms
        return (ce_T * ce_T.new_tensor(terms.ce_scale)).sum() + (kl_Q * kl_Q.new_tensor(terms.kl_scale)).sum()

    def gradients(self) -> list[Tensor | None]:
        """`lift` times d total / d (h, weight, bias), in the order of the operator's first arguments."""
        if self.dh_RD is not None:
            self._total(self.dh_RD)
        return [self.dh_RD, self.dweight_VD, self.dbias_V]

    def add(self, rows_CK: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """Adds the cross-entropy of every row and the KL of every pair of columns."""
        (chunk, streams), part = rows_CK.shape, self.terms.part
        rows_N = rows_CK.reshape(-1)
        weight_VD = self.given.weight_VD
        h_ND = self.given.h_RD[rows_N]
        logits_NV = h_ND @ weight_VD.T
        if self.given.bias_V is not None:
            logits_NV += self.given.bias_V
        # One exponential serves both the normaliser and the probabilities.
        logp_NV = logits_NV.to(self.dtype)
        largest_N1 = logp_NV.amax(dim=1, keepdim=True)
        logp_NV -= largest_N1 if part is None else part.largest(largest_N1)
        p_NV = logp_NV.exp()
        sum_N1 = self._total(p_NV.sum(dim=1, keepdim=True))
        logp_NV -= sum_N1.log()
        target_N1, term_N = self.given.target_R[rows_N, None], self.given.term_R[rows_N]
        smoothing = self.terms.label_smoothing
        factor_N1: Tensor | float = -(1.0 - smoothing)
        if part is not None:
            target_N1, here_N1 = part.place(target_N1)
            factor_N1 = here_N1.to(self.dtype) * factor_N1
        ce_N = (logp_NV.gather(1, target_N1) * factor_N1).squeeze(1)
        if smoothing:
            ce_N -= smoothing * (logp_NV.shape[1] / self.whole) * logp_NV.mean(dim=1)
        self.ce_T.index_add_(0, term_N, self._total(ce_N))
        if self.dh_RD is None and not pairs:
            return

        p_NV /= sum_N1
        ce_scale_N1 = self.ce_scale_T[term_N, None]
        if pairs:
            const_N1 = ce_scale_N1.clone()
            grad_NV = self._pairs(p_NV, logp_NV, const_N1, chunk, streams, pairs)
        else:
            grad_NV = p_NV.mul_(ce_scale_N1)
        if self.dh_RD is None or self.dweight_VD is None:
            return
        if smoothing:
            grad_NV -= ce_scale_N1 * (smoothing / self.whole)
        grad_NV.scatter_add_(1, target_N1, ce_scale_N1 * factor_N1)
        low_NV = grad_NV.to(weight_VD.dtype)
        self.dh_RD[rows_N] = low_NV @ weight_VD
        if self.dweight_VD.dtype == low_NV.dtype:
            self.dweight_VD.addmm_(low_NV.T, h_ND)
        elif self.shrink == 1.0:
            self.dweight_VD += low_NV.T @ h_ND
        else:
            self.dweight_VD.add_(low_NV.T @ (h_ND * self.shrink), alpha=1.0 / self.shrink)
        if self.dbias_V is not None:
            self.dbias_V += grad_NV.sum(dim=0)

    def _total(self, values: Tensor) -> Tensor:
        """Sum over the ranks that have a part of the vocabulary each; elsewhere the values are the sums already."""
        return values if self.terms.part is None else self.terms.part.total(values)

    def _pairs(
        self,
        p_NV: Tensor,
        logp_NV: Tensor,
        const_N1: Tensor,
        chunk: int,
        streams: int,
        pairs: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Adds the KLs; returns `lift` times d total / d logits without the target and smoothing parts."""
        p_CKV, logp_CKV = (x.view(chunk, streams, -1) for x in (p_NV, logp_NV))
        entropy_CKK = self._total(p_CKV @ logp_CKV.transpose(1, 2))
        const_CK = const_N1.view(chunk, streams)
        mix_logp_KK, mix_p_KK = (entropy_CKK.new_zeros(streams, streams) for _ in range(2))
        for index, (a, b) in enumerate(pairs):
            scale = 0.5 * self.kl_scale[index]
            forward_C = entropy_CKK[:, a, a] - entropy_CKK[:, a, b]
            backward_C = entropy_CKK[:, b, b] - entropy_CKK[:, b, a]
            self.kl_Q[index] += 0.5 * (forward_C.sum() + backward_C.sum())
            for one, other, expected_C in ((a, b, forward_C), (b, a, backward_C)):
                mix_logp_KK[one, one] += scale
                mix_logp_KK[one, other] -= scale
                mix_p_KK[one, other] -= scale
                const_CK[:, one] += scale * (1.0 - expected_C)
        grad_CKV = torch.matmul(mix_logp_KK, logp_CKV).add_(const_CK[:, :, None]).mul_(p_CKV)
        grad_CKV.baddbmm_(mix_p_KK.expand(chunk, -1, -1), p_CKV)
        return grad_CKV.view(chunk * streams, -1)


def lift_of(terms: Terms, dtype: torch.dtype) -> float:
    """In fp16 the power of two that brings the largest factor of a row to within (LARGEST_FP16 / 2, LARGEST_FP16]."""
    largest = max(terms.ce_scale, default=0.0) + sum(terms.kl_scale)
    if dtype != torch.float16 or not largest:
        return 1.0
    exponent = math.floor(math.log2(LARGEST_FP16 / largest))
    return 2.0 ** min(max(exponent, -64), 64)  # fp32 holds the lifted scales and the factor


def shrink_of(chunk_rows: int, dtype: torch.dtype) -> float:
    """A gradient of the weight sums over a chunk; in fp16 it is the sum over rows that are smaller by this."""
    return 0.5 ** math.floor(math.log2(chunk_rows)) if dtype == torch.float16 else 1.0

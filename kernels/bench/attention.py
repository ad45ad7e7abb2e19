"""Attention by groups of equal segments over one padded call with a dense mask, forward and backward.

Shapes: R packed rows, B samples, T padded length, H heads, D head width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from harness import Row, medians, require
from torch import Tensor
from torch.nn import functional as F

from parlance_kernels import SampleMask, sample_attention

HEADS, WIDTH, REPEATS = 4, 64, 9


def packed(q_RHD: Tensor, mask: SampleMask, weight_RHD: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of self-attention over packed rows; weight_RHD: gradient of the output."""
    x_RHD = q_RHD.detach().requires_grad_()
    o_RHD = sample_attention(x_RHD, x_RHD, x_RHD, mask)
    o_RHD.backward(weight_RHD)
    assert x_RHD.grad is not None
    return o_RHD.detach(), x_RHD.grad


def padded(x_BTHD: Tensor, mask_BTT: Tensor, weight_BTHD: Tensor) -> tuple[Tensor, Tensor]:
    """The same over padded samples with a dense boolean mask."""
    x_BTHD = x_BTHD.detach().requires_grad_()
    x_BHTD = x_BTHD.transpose(1, 2)
    o_BHTD = F.scaled_dot_product_attention(x_BHTD, x_BHTD, x_BHTD, attn_mask=mask_BTT[:, None])
    o_BHTD.backward(weight_BTHD.transpose(1, 2))
    assert x_BTHD.grad is not None
    return o_BHTD.transpose(1, 2).detach(), x_BTHD.grad


def row(name: str, lengths: Sequence[int]) -> Row:
    """Padded time over packed time for causal attention on samples of these lengths, after both agreed."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    segments = [(start, n, start, 1, 1, 0, 0, 0) for start, n in zip(starts, lengths, strict=False)]
    mask = SampleMask.build(segments, starts[-1])
    x_RHD, weight_RHD = torch.randn(2, starts[-1], HEADS, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()
    real_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    causal_TT = torch.ones(max(lengths), max(lengths), dtype=torch.bool).tril()
    # A padding row reads itself, so that its softmax is defined.
    mask_BTT = causal_TT & (real_BT[:, None, :] | torch.eye(max(lengths), dtype=torch.bool))
    x_BTHD, weight_BTHD = (torch.zeros(*real_BT.shape, HEADS, WIDTH) for _ in range(2))
    x_BTHD[real_BT], weight_BTHD[real_BT] = x_RHD, weight_RHD
    for ours, theirs in zip(packed(x_RHD, mask, weight_RHD), padded(x_BTHD, mask_BTT, weight_BTHD), strict=True):
        off = float((ours - theirs[real_BT]).abs().max())
        require(off < 1e-4, f"packed and padded attention must agree, they differ by {off:.2e}")
    fast, slow = medians(
        [lambda: packed(x_RHD, mask, weight_RHD), lambda: padded(x_BTHD, mask_BTT, weight_BTHD)], REPEATS
    )
    detail = f"{slow * 1e3:.1f} ms padded, {fast * 1e3:.1f} ms packed; {len(lengths)} samples, {starts[-1]} rows"
    return Row(name, slow / fast, None, "report", detail)


def rows() -> list[Row]:
    """`segments_ragged` and `segments_equal`: log-normal lengths, and all of one length."""
    rng = np.random.default_rng(0)
    ragged = np.clip(rng.lognormal(4.2, 0.8, 32), 8, 512).astype(int).tolist()
    return [row("segments_ragged", ragged), row("segments_equal", [256] * 16)]

"""Attention over packed rows under a SampleMask: no padding, and on CPU no mask for the regular patterns.

The CUDA kernels (`cuda.py`, kernels/csrc/attention.h) walk the tiles of 64 x 64 pairs that the mask names and read no
mask. The backend `library` (`flash.py`) splits the mask into variable-length calls of PyTorch's flash attention.

The torch backend serves all segments of equal shape with one `scaled_dot_product_attention` call. Batches of
equal lengths need one call a pattern; ragged ones fall back to a call a segment, which on CPU still beats one
padded call with a dense mask.

Shapes: R rows, K keys, H heads, D head width, B members of a group, T rows or keys of a member.
"""

import math
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from parlance_kernels.backend import resolve
from parlance_kernels.sample_attention import cuda, flash
from parlance_kernels.sample_attention.mask import SampleMask

COMPILED = {"cuda": cuda, "library": flash}


# What a mask says is Python, and another one in each batch: tracing it would never end.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def sample_attention(
    q_RHD: Tensor,
    k_KHD: Tensor,
    v_KHD: Tensor,
    mask: SampleMask,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of packed rows over packed keys.

    Args:
        q_RHD, k_KHD, v_KHD: floating, same dtype and device; R = mask.n_rows, K = mask.n_keys.
        mask: which keys each row reads.
        dropout_p: probability of dropping an attention weight, drawn from torch's generator.
        scale: factor on the scores, default 1 / sqrt(D).
        backend: a name that `parlance_kernels.resolve` accepts. The kernels of `cuda` take bf16 and fp16 with D = 32,
            64, 96 or 128 on a GPU, the calls of `library` the same with D = 8, 16 .. 192; anything else goes through
            PyTorch's dense attention, with a warning where it is on a GPU.

    Returns:
        o_RHD, equal to `sample_attention_reference` for dropout_p = 0.

    Raises:
        ValueError: if a shape contradicts the mask or the backend is unknown; `library`: a segment does not split.
    """
    chosen = resolve(backend)
    if q_RHD.shape[0] != mask.n_rows or k_KHD.shape[0] != mask.n_keys or v_KHD.shape != k_KHD.shape:
        raise ValueError(
            f"q, k, v must have {mask.n_rows}, {mask.n_keys}, {mask.n_keys} rows as the mask says, "
            f"got {q_RHD.shape[0]}, {k_KHD.shape[0]}, {v_KHD.shape[0]}"
        )
    if not len(mask):
        # Keeps q, k and v in the graph, so that an empty micro-batch runs the same backward as a full one.
        return q_RHD + 0.0 * (k_KHD.sum() + v_KHD.sum())
    if chosen in COMPILED and q_RHD.is_cuda:
        ours = COMPILED[chosen]
        if ours.supports(q_RHD):
            scale = 1.0 / math.sqrt(q_RHD.shape[2]) if scale is None else scale
            return ours.attend(q_RHD, k_KHD, v_KHD, mask, dropout_p, scale)
        _warn_once(chosen, q_RHD.dtype, q_RHD.shape[2])
    rows = mask.table[:, 1].tolist()
    q_parts = q_RHD.split(rows)
    k_blocks, v_blocks = _KeyBlocks(k_KHD, mask), _KeyBlocks(v_KHD, mask)
    o_parts: list[Tensor] = [q_RHD] * len(rows)
    for group in mask.groups:
        q_BHTD = _stack([q_parts[i] for i in group.members])
        visible = None if group.visible is None else group.visible.to(q_RHD.device)
        o_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_blocks.take(group.key_starts, group.keys),
            v_blocks.take(group.key_starts, group.keys),
            attn_mask=visible,
            dropout_p=dropout_p,
            is_causal=group.pattern == "causal",
            scale=scale,
        )
        for i, o_THD in zip(group.members, o_BHTD.transpose(1, 2).unbind(), strict=True):
            o_parts[i] = o_THD
    return o_parts[0] if len(o_parts) == 1 else torch.cat(o_parts)


@cache
def _warn_once(backend: str, dtype: torch.dtype, width: int) -> None:
    warnings.warn(
        f"sample_attention: {dtype} with heads of {width} goes through PyTorch's dense attention, "
        f"the backend {backend} takes {COMPILED[backend].TAKES}",
        stacklevel=3,
    )


def _stack(parts_THD: Sequence[Tensor]) -> Tensor:
    parts = parts_THD[0][None] if len(parts_THD) == 1 else torch.stack(list(parts_THD))
    return parts.transpose(1, 2)


class _KeyBlocks:
    """The key buffer cut once where samples begin: one concatenation in the backward instead of one scatter a slice."""

    def __init__(self, x_KHD: Tensor, mask: SampleMask) -> None:
        self.x_KHD = x_KHD
        self.starts = sorted({0, *mask.table[:, 2].tolist()})
        ends = [*self.starts[1:], mask.n_keys]
        self.blocks = x_KHD.split([end - start for start, end in zip(self.starts, ends, strict=True)])
        self.block_of = dict(zip(self.starts, self.blocks, strict=True))

    def take(self, starts: Sequence[int], length: int) -> Tensor:
        """[B, H, length, D]: the `length` keys from each of `starts`."""
        if not torch.is_grad_enabled() and len(starts) > 1:
            view = self._strided(starts, length)
            if view is not None:
                return view.transpose(1, 2)
        return _stack([self._slice(start, length) for start in starts])

    def _slice(self, start: int, length: int) -> Tensor:
        block = self.block_of[start]
        return block[:length] if block.shape[0] >= length else self.x_KHD[start : start + length]

    def _strided(self, starts: Sequence[int], length: int) -> Tensor | None:
        """Equally spaced members as a view: decoding reads its cache without copying it."""
        step = starts[1] - starts[0]
        first, stop = starts[0], starts[0] + step * len(starts)
        uneven = any(b - a != step for a, b in pairwise(starts))
        if uneven or step < length or stop > self.x_KHD.shape[0]:
            return None
        return self.x_KHD[first:stop].view(len(starts), step, *self.x_KHD.shape[1:])[:, :length]

"""Attention under a SampleMask, by its definition: dense scores, dense mask, softmax.

Shapes: R rows, K keys, H heads, D head width.
"""

import math

import torch
from torch import Tensor

from parlance_kernels.sample_attention.mask import SampleMask


def sample_attention_reference(
    q_RHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, mask: SampleMask, scale: float | None = None
) -> Tensor:
    """o_RHD = softmax(scale * q k^T + mask) v, with every (row, key) pair of the batch written out.

    scale: default 1 / sqrt(D). Rows are independent; keys outside a row's segment have no influence.
    """
    scale = 1.0 / math.sqrt(q_RHD.shape[-1]) if scale is None else scale
    scores_HRK = torch.einsum("rhd,khd->hrk", q_RHD, k_KHD) * scale
    visible_RK = mask.materialise().to(q_RHD.device)
    p_HRK = scores_HRK.masked_fill(~visible_RK, float("-inf")).softmax(dim=-1)
    return torch.einsum("hrk,khd->rhd", p_HRK, v_KHD)

"""`offramp_stats` as a PyTorch operator: a CUDA kernel on a GPU, PyTorch on a CPU. It has no gradient.

Shapes: L rows, V vocabulary.
"""

import ctypes

import torch
from torch import Tensor

from parlance_kernels import library

MOST_BANNED = 16  # tokens that travel with the launch
Stats = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def stats_torch(logits_LV: Tensor, banned: list[int], overwrite: bool = False) -> Stats:
    """`offramp_stats` in PyTorch; `overwrite`: logits of 32 bits and more are its workspace."""
    x_LV = logits_LV.float() if logits_LV.dtype.itemsize < 4 else logits_LV
    if x_LV is logits_LV and not overwrite:
        x_LV = x_LV.clone()
    max_L1 = x_LV.amax(dim=1, keepdim=True)
    x_LV -= max_L1
    e_LV = x_LV.exp()
    z_L = e_LV.sum(dim=1)
    log_z_L, max_L = z_L.log(), max_L1.squeeze(1)
    x_LV.clamp_(min=torch.finfo(x_LV.dtype).min)  # a logit of -inf has weight 0, and 0 times -inf would be no number
    # H = ln z - sum(e x) / z. Rounding may take it below 0, which no entropy is: nothing must leave at threshold 0.
    entropy_L = (log_z_L - torch.linalg.vecdot(e_LV, x_LV) / z_L).clamp(min=0)
    for token in banned:  # few; a list of them would be copied to the device, which no CUDA graph can hold
        x_LV.select(1, token).fill_(-torch.inf)
    best = x_LV.max(dim=1)
    return entropy_L, best.indices, best.values - log_z_L, max_L, max_L + log_z_L


def stats_cuda(logits_LV: Tensor, banned: list[int]) -> Stats:
    """`offramp_stats` in one launch that reads the logits once. bf16, fp16 or fp32.

    Raises:
        ValueError: more than `MOST_BANNED` tokens are banned, or another dtype.
    """
    if len(banned) > MOST_BANNED:
        raise ValueError(f"offramp_stats: at most {MOST_BANNED} tokens may be banned, got {len(banned)}")
    logits_LV = logits_LV.contiguous()
    made = entropy_L, token_L, log_p_L, max_L, lse_L = _like(logits_LV, banned)
    never = (ctypes.c_int64 * MOST_BANNED)(*banned)
    sizes = *logits_LV.shape, len(banned), library.dtype_code(logits_LV)
    library.call("parlance_offramp_stats", logits_LV, never, *made, *sizes)
    return entropy_L, token_L, log_p_L, max_L, lse_L


def _like(logits_LV: Tensor, banned: list[int]) -> Stats:
    rows = logits_LV.shape[0]
    made = [logits_LV.new_empty(rows, dtype=torch.promote_types(logits_LV.dtype, torch.float32)) for _ in range(4)]
    return made[0], logits_LV.new_empty(rows, dtype=torch.int64), made[1], made[2], made[3]


def _stats_cpu(logits_LV: Tensor, banned: list[int]) -> Stats:
    return stats_torch(logits_LV, banned)


stats = torch.library.custom_op("parlance::offramp_stats", _stats_cpu, mutates_args=(), device_types="cpu")
stats.register_kernel("cuda", stats_cuda)
stats.register_fake(_like)

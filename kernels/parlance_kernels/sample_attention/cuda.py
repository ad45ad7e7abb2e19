"""`sample_attention` as PyTorch operators on the CUDA kernels, with its gradient.

Shapes: R rows, K keys, H heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from parlance_kernels import library
from parlance_kernels.sample_attention.mask import SampleMask
from parlance_kernels.sample_attention.plan import parts, plan

WIDTHS = (32, 64, 96, 128)
DTYPES = (torch.float16, torch.bfloat16)
TAKES = f"float16 and bfloat16 with heads of {', '.join(map(str, WIDTHS))}"
DROP_STEPS = 1 << 16


def supports(q_RHD: Tensor) -> bool:
    """Whether the kernels take tensors like this one."""
    return q_RHD.device.type == "cuda" and q_RHD.dtype in DTYPES and q_RHD.shape[2] in WIDTHS


def attend(q_RHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, mask: SampleMask, dropout_p: float, scale: float) -> Tensor:
    """o_RHD as `sample_attention` says. The seed of dropout comes from torch's generator and stays on the device."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"sample_attention: dropout_p must be 0 .. 1 without 1, got {dropout_p}")
    seed = None
    if dropout_p > 0:
        seed = torch.randint(torch.iinfo(torch.int64).max, (1,), dtype=torch.int64, device=q_RHD.device)
    o_RHD, _ = attention(q_RHD, k_KHD, v_KHD, *plan(mask, q_RHD.device, q_RHD.shape[2]), seed, dropout_p, scale)
    return o_RHD


def forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor,
    sizes: list[int],
    room: int,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o_RHD, and the log-sum-exp of each row's scaled scores, float32 [H, R], -inf for a row without keys.

    words, sizes, room: a `Plan`. Dropout is by pair of row and key, with probability in steps of 2^-16.

    Raises:
        ValueError: no kernel takes this dtype or width, or the scale is not positive.
    """
    q, k, v = _inputs(q, k, v, scale)
    o_RHD, lse_HR = _like(q, k, v)
    tensors = *parts(words, sizes)[:4], q, k, v, o_RHD, lse_HR, seed
    numbers = *sizes[1:3], room, *q.shape, _drop_below(seed, dropout_p), library.dtype_code(q)
    library.call("parlance_attention_forward", *tensors, *numbers, float(scale))
    return o_RHD, lse_HR


def backward_cuda(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse_HR: Tensor,
    words: Tensor,
    sizes: list[int],
    room: int,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_q, d_k, d_v, the same bits every time. Arguments are those and the results of the forward."""
    q, k, v = _inputs(q, k, v, scale)
    d_o, o = (_aligned(x) for x in (d_o, o))
    d_q, d_k, d_v = _gradients_like(d_o, q, k, v)
    delta_HR = torch.empty_like(lse_HR)
    tensors = *parts(words, sizes), q, k, v, o, lse_HR, d_o, delta_HR, d_q, d_k, d_v, seed
    numbers = *sizes[1:3], room, sizes[4], *q.shape, _drop_below(seed, dropout_p), library.dtype_code(q)
    library.call("parlance_attention_backward", *tensors, *numbers, float(scale))
    return d_q, d_k, d_v


def _inputs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    one_kind = k.dtype == v.dtype == q.dtype and k.shape[1:] == q.shape[1:]
    if q.dtype not in DTYPES or q.shape[2] not in WIDTHS or not one_kind:
        raise ValueError(
            f"sample_attention: the kernels take float16 or bfloat16 with heads of {', '.join(map(str, WIDTHS))}, "
            f"the same for q, k and v, got {q.dtype} {list(q.shape[1:])}, {k.dtype} {list(k.shape[1:])} and {v.dtype}"
        )
    if scale <= 0:
        raise ValueError(f"sample_attention: scale must be positive, got {scale}")
    return _aligned(q), _aligned(k), _aligned(v)


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _drop_below(seed: Tensor | None, dropout_p: float) -> int:
    return 0 if seed is None else min(round(dropout_p * DROP_STEPS), DROP_STEPS - 1)


def _like(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, heads, _width = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(heads, rows, dtype=torch.float32)


def _gradients_like(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return made[0], made[1], made[2]


attention = torch.library.custom_op("parlance::sample_attention", forward_cuda, mutates_args=(), device_types="cuda")
attention.register_fake(_like)
attention_backward = torch.library.custom_op(
    "parlance::sample_attention_backward", backward_cuda, mutates_args=(), device_types="cuda"
)
attention_backward.register_fake(_gradients_like)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, words, ctx.sizes, ctx.room, seed, ctx.dropout_p, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, words, seed)


def _differentiate(ctx: Any, d_o: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse_HR, words, seed = ctx.saved_tensors
    plan_ = words, ctx.sizes, ctx.room
    found = attention_backward(d_o, q, k, v, o, lse_HR, *plan_, seed, ctx.dropout_p, ctx.scale)
    return *found, None, None, None, None, None, None


attention.register_autograd(_differentiate, setup_context=_remember)

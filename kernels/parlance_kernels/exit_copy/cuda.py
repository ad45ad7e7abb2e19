"""`exit_copy` as PyTorch operators: CUDA kernels on a GPU, the definition in PyTorch on a CPU, gradients for both.

Shapes: U rows of the table, A rows that the layer computed, N rows that leave, S rows that stay, D width.
"""

from typing import Any

import torch
from torch import Tensor

from parlance_kernels import library


def copy_torch(
    table_UD: Tensor, frozen: int, out_AD: Tensor, left_N: Tensor, stays_S: Tensor, detach: bool
) -> tuple[Tensor, Tensor]:
    """`exit_copy` in PyTorch; autograd differentiates it."""
    left_ND, stays_SD = out_AD.index_select(0, left_N), out_AD.index_select(0, stays_S)
    return torch.cat([table_UD[:frozen], left_ND.detach() if detach else left_ND, stays_SD]), left_ND


def copy_cuda(
    table_UD: Tensor, frozen: int, out_AD: Tensor, left_N: Tensor, stays_S: Tensor, detach: bool
) -> tuple[Tensor, Tensor]:
    """`exit_copy` in one launch. bf16, fp16 or fp32."""
    library.dtype_code(out_AD)
    table_UD, out_AD, left_N, stays_S = (x.contiguous() for x in (table_UD, out_AD, left_N, stays_S))
    next_UD, left_ND = _copy_like(table_UD, frozen, out_AD, left_N, stays_S, detach)
    row_bytes = out_AD.shape[1] * out_AD.element_size()
    sizes = frozen, len(left_N), len(stays_S), row_bytes
    library.call("parlance_exit_copy", table_UD, out_AD, left_N, stays_S, next_UD, left_ND, *sizes)
    return next_UD, left_ND


def backward_torch(
    d_next: Tensor, d_left: Tensor, left_N: Tensor, stays_S: Tensor, states: int, rows: int, frozen: int, detach: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the table [U, D] and of the output [A, D]."""
    d_table, d_out = _gradients_like(d_next, d_left, left_N, stays_S, states, rows, frozen, detach)
    d_table[:frozen], d_table[frozen:] = d_next[:frozen], 0
    _, copied_ND, stays_SD = d_next.split([frozen, len(left_N), len(stays_S)])
    owed_ND = d_left if detach else d_left + copied_ND
    return d_table, d_out.zero_().index_add_(0, left_N, owed_ND).index_add_(0, stays_S, stays_SD)


def backward_cuda(
    d_next: Tensor, d_left: Tensor, left_N: Tensor, stays_S: Tensor, states: int, rows: int, frozen: int, detach: bool
) -> tuple[Tensor, Tensor]:
    """The same without atomics: every row gathers what it is owed and rounds once."""
    d_next, d_left, left_N, stays_S = (x.contiguous() for x in (d_next, d_left, left_N, stays_S))
    d_table, d_out = _gradients_like(d_next, d_left, left_N, stays_S, states, rows, frozen, detach)
    place_2A = torch.full((2, rows), -1, dtype=torch.int32, device=d_next.device)
    sizes = frozen, len(left_N), len(stays_S), states, rows, d_next.shape[1], int(detach), library.dtype_code(d_next)
    library.call("parlance_exit_copy_backward", d_next, d_left, left_N, stays_S, place_2A, d_table, d_out, *sizes)
    return d_table, d_out


def _copy_like(
    table_UD: Tensor, frozen: int, out_AD: Tensor, left_N: Tensor, stays_S: Tensor, detach: bool
) -> tuple[Tensor, Tensor]:
    width, n, s = out_AD.shape[1], left_N.shape[0], stays_S.shape[0]
    return out_AD.new_empty(frozen + n + s, width), out_AD.new_empty(n, width)


def _gradients_like(
    d_next: Tensor, d_left: Tensor, left_N: Tensor, stays_S: Tensor, states: int, rows: int, frozen: int, detach: bool
) -> tuple[Tensor, Tensor]:
    return d_next.new_empty(states, d_next.shape[1]), d_next.new_empty(rows, d_next.shape[1])


copy = torch.library.custom_op("parlance::exit_copy", copy_torch, mutates_args=(), device_types="cpu")
copy.register_kernel("cuda", copy_cuda)
copy.register_fake(_copy_like)
copy_backward = torch.library.custom_op(
    "parlance::exit_copy_backward", backward_torch, mutates_args=(), device_types="cpu"
)
copy_backward.register_kernel("cuda", backward_cuda)
copy_backward.register_fake(_gradients_like)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    table_UD, ctx.frozen, out_AD, left_N, stays_S, ctx.detach = inputs
    ctx.states, ctx.rows = table_UD.shape[0], out_AD.shape[0]
    ctx.save_for_backward(left_N, stays_S)


def _differentiate(ctx: Any, d_next: Tensor, d_left: Tensor) -> tuple[Tensor | None, ...]:
    d_table, d_out = copy_backward(d_next, d_left, *ctx.saved_tensors, ctx.states, ctx.rows, ctx.frozen, ctx.detach)
    return d_table, None, d_out, None, None, None


copy.register_autograd(_differentiate, setup_context=_remember)

"""`sample_attention` by the flash attention that PyTorch brings: an exact split into its calls, and how they merge.

`split.py` cuts a mask into parts, at most three of which have a given row. With o_p the output of part p for a row and
lse_p the log-sum-exp of its scores, the whole row is (FlashAttention-2, arXiv 2307.08691, section 2.3)

    lse = log sum_p exp(lse_p)          o = sum_p exp(lse_p - lse) o_p

A flash backward makes its weights again from scores and log-sum-exp, P_ij = exp(s_ij - lse_i), and their gradient from
dP_ij = dO_i . V_j and D_i = dO_i . O_i, as dS_ij = P_ij (dP_ij - D_i). Given o and lse of the whole row instead of its
own, a part's backward makes the very P, D and dS of the whole for the pairs that it has; dQ, dK and dV are sums over
pairs, and every pair is in one part, so they are the sums of what the parts give.

Dropout multiplies o_p's weights after the softmax and leaves lse_p alone, so the merge holds; D_i is dO_i . O_i with
dropout, too, and each call's backward draws again from the state of the generator that its forward returned.

Shapes: R rows, K keys, P rows or keys of a call or of all calls, H heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from parlance_kernels.sample_attention.mask import SampleMask
from parlance_kernels.sample_attention.split import Call, Layer, split, unpack

TAKES = "float16 and bfloat16 with heads of a multiple of 8 up to 192"
DTYPES = (torch.float16, torch.bfloat16)


def supports(q_RHD: Tensor) -> bool:
    """Whether the library takes tensors like this one."""
    return q_RHD.is_cuda and q_RHD.dtype in DTYPES and q_RHD.shape[2] % 8 == 0 and q_RHD.shape[2] <= 192


def attend(q_RHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, mask: SampleMask, dropout_p: float, scale: float) -> Tensor:
    """o_RHD as `sample_attention` says; dropout draws from torch's generator, call by call.

    Raises:
        ValueError: the mask has a segment that does not split, or no such probability.
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"sample_attention: dropout_p must be 0 .. 1 without 1, got {dropout_p}")
    return attention(q_RHD, k_KHD, v_KHD, *split(mask, q_RHD.device), dropout_p, scale)[0]


def varlen_forward(
    q_PHD: Tensor, k_PHD: Tensor, v_PHD: Tensor, call: Call, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The library's call: o_PHD, float32 lse_HP of the scaled scores, and the generator's state in two tensors.

    q_PHD, k_PHD, v_PHD: as the call has them, the last dimension contiguous.
    """
    sizes = call.row_ends, call.key_ends, call.most_rows, call.most_keys
    o_PHD, lse_HP, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q_PHD, k_PHD, v_PHD, *sizes, dropout_p, call.causal, False, scale=scale
    )
    if lse_HP.shape != (q_PHD.shape[1], q_PHD.shape[0]):
        raise RuntimeError(
            f"flash attention of torch {torch.__version__} must return a log-sum-exp for every head and row, "
            f"{[q_PHD.shape[1], q_PHD.shape[0]]}, got {list(lse_HP.shape)}; take another `backend`"
        )
    return o_PHD, lse_HP, seed, offset


def varlen_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse_HP: Tensor, seed: Tensor, offset: Tensor,
    call: Call, dropout_p: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The library's gradients of q, k and v, all [P, H, D], from output and log-sum-exp of the whole rows."""
    sizes = call.row_ends, call.key_ends, call.most_rows, call.most_keys
    d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
        d_o, q, k, v, o, lse_HP, *sizes, dropout_p, call.causal, seed, offset, scale=scale
    )
    return d_q, d_k, d_v


def forward(
    q: Tensor, k: Tensor, v: Tensor, words: Tensor, sizes: list[int], dropout_p: float, scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """o_RHD, float32 log-sum-exp of each row's scaled scores [H, R], and the generator's state before each call.

    words, sizes: a `Split`.
    """
    calls, row_layers, _ = unpack(words, sizes)
    made = [
        varlen_forward(_take(q, c.rows_P), _take(k, c.keys_P), _take(v, c.keys_P), c, dropout_p, scale) for c in calls
    ]
    o_parts, lse_parts, seeds, offsets = zip(*made, strict=True)
    o, lse_HR = _merged(_joined(o_parts, 0), _joined(lse_parts, 1), row_layers, len(q))
    return o, lse_HR, [*seeds, *offsets]


def backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse_HR: Tensor, states: list[Tensor],
    words: Tensor, sizes: list[int], dropout_p: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_q, d_k, d_v: sums in float32 of what the calls give. Other arguments are those and the results of `forward`."""
    calls, row_layers, key_layers = unpack(words, sizes)
    d_o = d_o.contiguous()
    made = []
    for number, c in enumerate(calls):
        d_P, q_P, o_P = (_take(x, c.rows_P) for x in (d_o, q, o))
        k_P, v_P = (_take(x, c.keys_P) for x in (k, v))
        lse_HP = lse_HR.index_select(1, c.rows_P) if len(c.rows_P) else lse_HR
        drawn = states[number], states[number + len(calls)]
        made.append(varlen_backward(d_P, q_P, k_P, v_P, o_P, lse_HP, *drawn, c, dropout_p, scale))
    parts = [_joined(each, 0) for each in zip(*made, strict=True)]
    layers = (row_layers, len(q)), (key_layers, len(k)), (key_layers, len(v))
    d_q, d_k, d_v = (_sums(x, *where).to(x.dtype) for x, where in zip(parts, layers, strict=True))
    return d_q, d_k, d_v


def _merged(o_PHD: Tensor, lse_HP: Tensor, layers: list[Layer], n_rows: int) -> tuple[Tensor, Tensor]:
    if not layers:
        return o_PHD, lse_HP
    if len(layers) == 1:
        return o_PHD.index_select(0, layers[0].places), lse_HP.index_select(1, layers[0].places)
    lse_HR = lse_HP.new_full((len(lse_HP), n_rows), -torch.inf)
    for targets, places in layers:
        lse_HR[:, targets] = torch.logaddexp(lse_HR[:, targets], lse_HP[:, places])
    o = o_PHD.new_zeros((n_rows, *o_PHD.shape[1:]), dtype=lse_HP.dtype)
    for targets, places in layers:
        weight_PH1 = (lse_HP[:, places] - lse_HR[:, targets]).exp().T[:, :, None]
        o.index_add_(0, targets, o_PHD.index_select(0, places) * weight_PH1)
    return o.to(o_PHD.dtype), lse_HR


def _sums(x_PHD: Tensor, layers: list[Layer], n: int) -> Tensor:
    """What the calls give for each row or key, added in one order: no layer has a target twice."""
    if not layers:
        return x_PHD
    total = x_PHD.new_zeros((n, *x_PHD.shape[1:]), dtype=torch.promote_types(x_PHD.dtype, torch.float32))
    for targets, places in layers:
        total.index_add_(0, targets, x_PHD.index_select(0, places).to(total.dtype))
    return total


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x`, all of them as they are where `index` is empty."""
    if len(index):
        return x.index_select(0, index)
    return x if x.stride(-1) == 1 else x.contiguous()


def _joined(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _gradients_like(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return made[0], made[1], made[2]


attention = torch.library.custom_op("parlance::library_attention", forward, mutates_args=())
attention.register_fake(forward)  # made of operators that have fakes, the library's own knows what states it returns
attention_backward = torch.library.custom_op("parlance::library_attention_backward", backward, mutates_args=())
attention_backward.register_fake(_gradients_like)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    q, k, v, words, ctx.sizes, ctx.dropout_p, ctx.scale = inputs
    o, lse_HR, states = output
    ctx.mark_non_differentiable(lse_HR, *states)
    ctx.save_for_backward(q, k, v, o, lse_HR, words, *states)


def _differentiate(ctx: Any, d_o: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse_HR, words, *states = ctx.saved_tensors
    found = attention_backward(d_o, q, k, v, o, lse_HR, states, words, ctx.sizes, ctx.dropout_p, ctx.scale)
    return *found, None, None, None, None


attention.register_autograd(_differentiate, setup_context=_remember)

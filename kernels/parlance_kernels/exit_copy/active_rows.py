"""Which rows go on, found and moved on the device: no shape depends on the answer, so nothing waits for the host.

For writing, where exits are found as one goes; under a CUDA graph all shapes are fixed and the number of rows is read
on the device. Without gradients.

Shapes: N rows, D width.
"""

import torch
from torch import Tensor

from parlance_kernels import library
from parlance_kernels.backend import resolve


def compact_rows(active_N: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Puts active rows first.

    Args:
        active_N: bool.
        backend: a name that `parlance_kernels.resolve` accepts.

    Returns:
        rows_N: int64, the active rows and behind them the others, each ascending. count_1: int64, how many are active.

    Raises:
        ValueError: `active_N` is not bool [N].
    """
    chosen = resolve(backend)
    if active_N.dtype != torch.bool or active_N.dim() != 1:
        raise ValueError(f"compact_rows: flags must be bool [rows], got {active_N.dtype} {list(active_N.shape)}")
    return (_compact if chosen == "cuda" else _compact_torch)(active_N)


def gather_rows(x_ND: Tensor, rows_N: Tensor, count_1: Tensor, backend: str = "auto") -> Tensor:
    """[N, D]: row i is `x_ND[rows_N[i]]` for i < count, and zero behind; rows and count are `compact_rows`'s."""
    return (_gather if resolve(backend) == "cuda" else _gather_torch)(x_ND, rows_N, count_1)


def scatter_rows_(to_ND: Tensor, rows_N: Tensor, count_1: Tensor, x_ND: Tensor, backend: str = "auto") -> None:
    """Writes row i of `x_ND` to row `rows_N[i]` of `to_ND`, a contiguous tensor without gradient, for i < count."""
    (_scatter if resolve(backend) == "cuda" else _scatter_torch)(to_ND, rows_N, count_1, x_ND)


def _compact_torch(active_N: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sort(~active_N, stable=True).indices, active_N.sum().reshape(1)


def compact_cuda(active_N: Tensor) -> tuple[Tensor, Tensor]:
    """`compact_rows` in one launch of one block."""
    active_N = active_N.contiguous()
    rows_N, count_1 = _compact_like(active_N)
    library.call("parlance_compact_rows", active_N, rows_N, count_1, len(active_N))
    return rows_N, count_1


def _compact_like(active_N: Tensor) -> tuple[Tensor, Tensor]:
    return active_N.new_empty(active_N.shape[0], dtype=torch.int64), active_N.new_empty(1, dtype=torch.int64)


def _gather_torch(x_ND: Tensor, rows_N: Tensor, count_1: Tensor) -> Tensor:
    return torch.where(_first(rows_N, count_1), x_ND.index_select(0, rows_N), x_ND.new_zeros(()))


def gather_cuda(x_ND: Tensor, rows_N: Tensor, count_1: Tensor) -> Tensor:
    """`gather_rows` in one launch; 16-bit numbers or wider."""
    x_ND = x_ND.contiguous()
    out_ND = torch.empty_like(x_ND)
    library.call("parlance_gather_rows", x_ND, rows_N, count_1, out_ND, len(x_ND), _row_bytes(x_ND))
    return out_ND


def _scatter_torch(to_ND: Tensor, rows_N: Tensor, count_1: Tensor, x_ND: Tensor) -> None:
    to_ND.index_copy_(0, rows_N, torch.where(_first(rows_N, count_1), x_ND, to_ND.index_select(0, rows_N)))


def scatter_cuda(to_ND: Tensor, rows_N: Tensor, count_1: Tensor, x_ND: Tensor) -> None:
    """`scatter_rows_` in one launch; 16-bit numbers or wider."""
    x_ND = x_ND.contiguous()
    library.call("parlance_scatter_rows", x_ND, rows_N, count_1, to_ND, len(x_ND), _row_bytes(x_ND))


def _first(rows_N: Tensor, count_1: Tensor) -> Tensor:
    return (torch.arange(rows_N.shape[0], device=rows_N.device) < count_1)[:, None]


def _row_bytes(x_ND: Tensor) -> int:
    return x_ND.shape[1] * x_ND.element_size()


_compact = torch.library.custom_op("parlance::compact_rows", _compact_torch, mutates_args=(), device_types="cpu")
_compact.register_kernel("cuda", compact_cuda)
_compact.register_fake(_compact_like)
_gather = torch.library.custom_op("parlance::gather_rows", _gather_torch, mutates_args=(), device_types="cpu")
_gather.register_kernel("cuda", gather_cuda)
_gather.register_fake(lambda x_ND, rows_N, count_1: torch.empty_like(x_ND))
_scatter = torch.library.custom_op(
    "parlance::scatter_rows_", _scatter_torch, mutates_args=("to_ND",), device_types="cpu"
)
_scatter.register_kernel("cuda", scatter_cuda)
_scatter.register_fake(lambda to_ND, rows_N, count_1, x_ND: None)

"""Early exit without a mask: states that left are kept in front of the table, states that go on behind them.

Shapes: U rows of the table, A rows that the layer computed, N rows that leave, S rows that stay, D width.
"""

from torch import Tensor

from parlance_kernels.backend import resolve
from parlance_kernels.exit_copy import cuda


def exit_copy(
    table_UD: Tensor,
    frozen: int,
    out_AD: Tensor,
    left_N: Tensor,
    stays_S: Tensor,
    detach: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The table that the next layer reads, and the states that leave now.

    Args:
        table_UD: what the layer read; its first `frozen` rows left in earlier layers and stay as they are.
        out_AD: what it computed.
        left_N, stays_S: int64 rows of `out_AD` that leave, and that go on. A row may be in both (it stands for several
            copies of a token, of which only some leave) or in neither, but twice in none of them.
        detach: no gradient reaches a state that left through the layers above it.
        backend: a name that `parlance_kernels.resolve` accepts.

    Returns:
        next_UD: [frozen + N + S, D]. left_ND: with gradient whatever `detach` says, for the loss of those rows.

    Raises:
        ValueError: widths differ or `frozen` is not a number of rows of the table; the backend is unknown.
    """
    chosen = resolve(backend)
    if not 0 <= frozen <= len(table_UD) or table_UD.shape[1] != out_AD.shape[1]:
        raise ValueError(
            f"exit_copy: `frozen` must be 0..{len(table_UD)} and both widths {table_UD.shape[1]}, "
            f"got {frozen} and {out_AD.shape[1]}"
        )
    run = cuda.copy if chosen == "cuda" else cuda.copy_torch
    return run(table_UD, frozen, out_AD, left_N, stays_S, detach)

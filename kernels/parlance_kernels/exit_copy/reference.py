"""What a state table holds after a layer, by its definition: one row after another.

Shapes: U rows of the table, A rows that the layer computed, N rows that leave, S rows that stay, D width.
"""

import torch
from torch import Tensor


def exit_copy_reference(
    table_UD: Tensor, frozen: int, out_AD: Tensor, left_N: Tensor, stays_S: Tensor, detach: bool
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `exit_copy` (ELMER, section 4.2: "directly copied to the upper layers")."""
    left = [out_AD[row] for row in left_N.tolist()]
    copied = [state_D.detach() if detach else state_D for state_D in left]
    rows = [*(table_UD[row] for row in range(frozen)), *copied, *(out_AD[row] for row in stays_S.tolist())]
    nothing = out_AD.new_zeros(0, out_AD.shape[1])
    return torch.stack(rows) if rows else nothing, torch.stack(left) if left else nothing

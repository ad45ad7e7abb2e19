"""x W^T + b, the product of every layer. Where no gradient is wanted, a CPU does large ones by oneDNN instead of MKL.

PyTorch hands float32 products to MKL. That is slow for the few rows of a decoding step, and on AMD processors for
any number: on one thread of an AMD EPYC, 768 -> 50,265 takes 26.5 ms by MKL and 14.8 ms by oneDNN for 5 rows, 101 and
55 ms for 64; 768 -> 3,072 1.37 and 0.99 ms for 5 rows. oneDNN is part of the same wheel; PyTorch's own compiler calls
it through the operator used here, which has no derivative.

Shapes: R rows, I inputs, O outputs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Entries of the weight: below, the call into oneDNN (about 20 us, and 0.3 ms for a new shape) costs more than it saves.
LARGE = 1 << 18


def linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[R, O], equal to `F.linear` up to the order of summation.

    `torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off, here as elsewhere in PyTorch.
    """
    if not torch.is_grad_enabled() and _by_onednn(x_RI, weight_OI):
        return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")
    return F.linear(x_RI, weight_OI, bias_O)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x_RI: Tensor) -> Tensor:
        return linear(x_RI, self.weight, self.bias)


class PairLinear(Linear):
    """W [x ; y] for rows that need not lie side by side: half of the columns are for x, the others for y."""

    def forward(self, x_RI: Tensor, y_RI: Tensor) -> Tensor:  # type: ignore[override]
        for_x_OI, for_y_OI = self.weight.chunk(2, dim=1)
        return linear(x_RI, for_x_OI, self.bias) + linear(y_RI, for_y_OI)


def _by_onednn(x_RI: Tensor, weight_OI: Tensor) -> bool:
    return bool(
        x_RI.device.type == "cpu"
        and x_RI.dtype == weight_OI.dtype == torch.float32
        and weight_OI.numel() >= LARGE
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )

"""Which lengths a parallel decoder tries: the length predictor's choice and its neighbours or runners-up.

Shapes: B sources, N length classes, K candidates a source.
"""

from typing import Literal

import torch
from torch import Tensor

LengthChoice = Literal["contiguous", "topk"]
EMPTY = 2  # BOS and EOS: the length of an empty text


def candidate_lengths(logits_BN: Tensor, beam: int, choice: LengthChoice, longest: int) -> Tensor:
    """int64 [B, K] on the host: distinct target lengths with BOS and EOS, K = min(beam, longest - 2).

    `contiguous` takes the window of `beam` lengths around the likeliest one, starting beam // 2 below it and shifted
    where it would leave [3, longest]; `topk` takes the likeliest ones. The empty text is a candidate only where the
    predictor likes it best: nothing is predicted in it, so on average log-probability it would beat every other.
    """
    logits_BN = logits_BN[:, : longest + 1].float().cpu()
    logits_BN[:, :EMPTY] = -torch.inf
    best_B = logits_BN.argmax(dim=1)
    lowest_B = torch.where(best_B == EMPTY, EMPTY, EMPTY + 1)
    width = min(beam, longest - EMPTY)
    if choice == "topk":
        logits_BN[best_B != EMPTY, EMPTY] = -torch.inf
        return logits_BN.topk(width, dim=1).indices
    first_B = (best_B - width // 2).clamp(max=longest - width + 1).maximum(lowest_B)
    return first_B[:, None] + torch.arange(width)

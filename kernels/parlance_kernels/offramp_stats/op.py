"""What an off-ramp says of each row: how sure it is, of which token, and the sums that make a probability of a logit.

With m = max z, s = sum e^(z - m) and t = sum (z - m) e^(z - m) the entropy is ln s - t / s and the log-sum-exp
m + ln s, so one pass over the logits is enough.

Shapes: L rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from parlance_kernels.backend import resolve
from parlance_kernels.offramp_stats import cuda


class RampStats(NamedTuple):
    """Of each row, in float32 or wider; probabilities are over the whole vocabulary, whatever is banned.

    entropy_L: of the distribution, in nats. token_L: int64, the likeliest token that is not banned, the lowest of
    equals. log_p_L: the logarithm of its probability. max_L: the largest logit. lse_L: log-sum-exp of the logits.
    """

    entropy_L: Tensor
    token_L: Tensor
    log_p_L: Tensor
    max_L: Tensor
    lse_L: Tensor


def offramp_stats(
    logits_LV: Tensor, banned: Sequence[int] = (), overwrite: bool = False, backend: str = "auto"
) -> RampStats:
    """Statistics of each row of logits; without a gradient (DeeBERT; ELMER, section 4.3).

    Args:
        logits_LV: floating; -inf has probability 0, and a row with NaN has entropy NaN.
        banned: tokens that are never best; with the kernel at most 16.
        overwrite: the operator may use the logits as workspace.
        backend: a name that `parlance_kernels.resolve` accepts.

    Raises:
        ValueError: logits are no [L, V] with V > 0; a banned token is outside the vocabulary; the backend is unknown.
    """
    chosen = resolve(backend)
    if logits_LV.dim() != 2 or not logits_LV.shape[1]:
        raise ValueError(f"offramp_stats: logits must be [rows, vocabulary], got {list(logits_LV.shape)}")
    never = list(banned)
    if never and not 0 <= min(never) <= max(never) < logits_LV.shape[1]:
        raise ValueError(f"offramp_stats: banned tokens must be 0..{logits_LV.shape[1] - 1}, got {never}")
    if chosen == "cuda":
        return RampStats(*cuda.stats(logits_LV.detach(), never))
    return RampStats(*cuda.stats_torch(logits_LV.detach(), never, overwrite))

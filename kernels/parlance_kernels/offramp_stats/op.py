"""What an off-ramp says of each row: how sure it is, of which token, and the sums that make a probability of a logit.

With m = max z, s = sum e^(z - m) and t = sum (z - m) e^(z - m) the entropy is ln s - t / s and the log-sum-exp
m + ln s, so one pass over the logits is enough.

Shapes: L rows, V vocabulary, P parts of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from parlance_kernels.backend import resolve
from parlance_kernels.offramp_stats import cuda
from parlance_kernels.vocab_part import VocabPart


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
    logits_LV: Tensor,
    banned: Sequence[int] = (),
    overwrite: bool = False,
    backend: str = "auto",
    part: VocabPart | None = None,
) -> RampStats:
    """Statistics of each row of logits; without a gradient (DeeBERT; ELMER, section 4.3).

    Args:
        logits_LV: floating; -inf has probability 0, and a row with NaN has entropy NaN.
        banned: tokens that are never best; with the kernel at most 16.
        overwrite: the operator may use the logits as workspace.
        backend: a name that `parlance_kernels.resolve` accepts.
        part: which tokens the logits are of; None: all. Every rank of its group calls this with the same rows and gets
            the same statistics, those of the whole vocabulary. In each part a logit of every row must be finite.

    Raises:
        ValueError: logits are no [L, V] with V > 0; a banned token is outside the vocabulary; the backend is unknown.
    """
    chosen = resolve(backend)
    if logits_LV.dim() != 2 or not logits_LV.shape[1]:
        raise ValueError(f"offramp_stats: logits must be [rows, vocabulary], got {list(logits_LV.shape)}")
    never, whole = list(banned), logits_LV.shape[1] if part is None else part.whole
    if never and not 0 <= min(never) <= max(never) < whole:
        raise ValueError(f"offramp_stats: banned tokens must be 0..{whole - 1}, got {never}")
    if part is not None:
        never = [token - part.start for token in never if part.start <= token < part.start + part.size]
    if chosen == "cuda":
        found = RampStats(*cuda.stats(logits_LV.detach(), never))
    else:
        found = RampStats(*cuda.stats_torch(logits_LV.detach(), never, overwrite))
    return found if part is None else _over_parts(found, part)


def _over_parts(mine: RampStats, part: VocabPart) -> RampStats:
    """Statistics of the whole vocabulary from those of its parts.

    A part has the share w = e^(lse of the part - lse), and H = sum over parts of w (H of the part - ln w).
    """
    lse_PL = part.every(mine.lse_L)
    lse_L = lse_PL.logsumexp(dim=0)
    log_w_L = mine.lse_L - lse_L
    entropy_L = part.total(log_w_L.exp() * (mine.entropy_L - log_w_L))
    log_p_L, token_L = part.best(mine.log_p_L + log_w_L, mine.token_L)
    return RampStats(entropy_L.clamp(min=0), token_L, log_p_L, part.largest(mine.max_L), lse_L)

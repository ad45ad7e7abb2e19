"""Statistics of an off-ramp by their definitions, one row after another.

Shapes: L rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def offramp_stats_reference(logits_LV: Tensor, banned: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """Same arguments and results as `offramp_stats`, in the precision of the logits."""
    rows = []
    for logits_V in logits_LV:
        log_p_V = logits_V - logits_V.logsumexp(dim=0)
        p_V = log_p_V.exp()
        entropy = -sum((p * log_p for p, log_p in zip(p_V, log_p_V, strict=True) if p > 0), torch.zeros_like(p_V[0]))
        allowed = [token for token in range(len(logits_V)) if token not in banned]
        token = max(allowed, key=lambda v: (float(logits_V[v]), -v))
        rows.append((entropy, torch.tensor(token), log_p_V[token], logits_V.max(), logits_V.logsumexp(dim=0)))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))

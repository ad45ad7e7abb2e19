"""Cross-entropy and symmetric KL over the vocabulary, by their definitions: all logits at once, autograd does the rest.

Shapes: R rows, D width, V vocabulary, T cross-entropy terms, P tuples, K streams in a tuple, Q stream pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def vocab_loss_reference(
    h_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    term_R: Tensor,
    tuple_PK: Tensor,
    ce_scale: Sequence[float],
    kl_pairs: Sequence[tuple[int, int]] = (),
    kl_scale: Sequence[float] = (),
    label_smoothing: float = 0.0,
    bias_V: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same arguments and results as `vocab_loss`.

    Cross-entropy: (1 - eps) * -log p[target] + eps * mean over the vocabulary of -log p (JANUS, released criterion).
    KL of a pair: half of KL(p||q) + KL(q||p), both sides receive gradient (JANUS, Eq. 3-5).
    """
    logits_RV = h_RD @ weight_VD.T
    if bias_V is not None:
        logits_RV = logits_RV + bias_V
    if logits_RV.dtype in (torch.float16, torch.bfloat16):
        logits_RV = logits_RV.float()
    logp_RV = logits_RV.log_softmax(dim=-1)
    nll_R = -logp_RV.gather(1, target_R[:, None]).squeeze(1)
    ce_R = (1.0 - label_smoothing) * nll_R - label_smoothing * logp_RV.mean(dim=1)
    ce_T = torch.zeros(len(ce_scale), dtype=ce_R.dtype, device=ce_R.device).index_add(0, term_R, ce_R)
    kl_Q = ce_T.new_zeros(len(kl_pairs))
    for index, (a, b) in enumerate(kl_pairs):
        p_PV, q_PV = logp_RV[tuple_PK[:, a]], logp_RV[tuple_PK[:, b]]
        both = (p_PV.exp() * (p_PV - q_PV)).sum() + (q_PV.exp() * (q_PV - p_PV)).sum()
        kl_Q = kl_Q + torch.nn.functional.one_hot(torch.tensor(index), len(kl_pairs)).to(kl_Q) * (0.5 * both)
    total = (ce_T * ce_T.new_tensor(list(ce_scale))).sum() + (kl_Q * kl_Q.new_tensor(list(kl_scale))).sum()
    return total, ce_T.detach(), kl_Q.detach()

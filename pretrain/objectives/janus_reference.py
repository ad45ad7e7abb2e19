"""The JANUS objective by its definition, the judge of the packed one.

Two encoder passes, one AR pass and one NAR/AUX pass on padded batches with dense B x T x S masks built from the
predicates of the paper, logits for every row, log-softmax chains for the losses; autograd does the rest.

Kinds of NAR/AUX content rows: 0 visible, 1 MASK, 2 compensation, -1 padding; rank: index among the masked tokens.
Shapes: B samples, S source rows, T content rows, Q query rows, M masked tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models import EncoderDecoder, reference
from pretrain.models.patterns import ArLayout
from pretrain.objectives.base import Example, LossSums
from pretrain.objectives.janus import KL_TERMS

VISIBLE, MASK, TRUTH = 0, 1, 2


@dataclass(frozen=True)
class ReferencePass:
    """Everything the two passes compute; rows of padding hold undefined values."""

    length_BN: Tensor
    ar_content_BTV: Tensor
    ar_query_BTV: Tensor
    nar_content_BTV: Tensor
    aux_query_BQV: Tensor
    content_visible_BTT: Tensor
    query_visible_BQT: Tensor


def content_mask(kind_BT: Tensor, rank_BT: Tensor) -> Tensor:
    """bool [B, T, T]: who reads whom in the NAR/AUX content stream (SYSTEMS A.3)."""
    row_kind, key_kind = kind_BT[:, :, None], kind_BT[:, None, :]
    row_rank, key_rank = rank_BT[:, :, None], rank_BT[:, None, :]
    nar = (row_kind != TRUTH) & ((key_kind == VISIBLE) | (key_kind == MASK))
    later_mask = (key_kind == MASK) & (key_rank > row_rank)
    earlier_truth = (key_kind == TRUTH) & (key_rank <= row_rank)
    aux = (row_kind == TRUTH) & ((key_kind == VISIBLE) | later_mask | earlier_truth)
    return torch.where(row_kind < 0, key_kind >= 0, nar | aux)


def query_mask(kind_BT: Tensor, rank_BT: Tensor, queries_BQ: Tensor) -> Tensor:
    """bool [B, Q, T]: query rank k reads visible tokens, MASKs of ranks >= k and truths of ranks < k."""
    key_kind, key_rank = kind_BT[:, None, :], rank_BT[:, None, :]
    row_rank = torch.arange(queries_BQ.shape[1])[None, :, None]
    seen = (key_kind == VISIBLE) | ((key_kind == MASK) & (key_rank >= row_rank))
    seen |= (key_kind == TRUTH) & (key_rank < row_rank)
    return torch.where(queries_BQ[:, :, None], seen, key_kind >= 0)


def forward(model: EncoderDecoder, examples: Sequence[Example], layout: ArLayout) -> ReferencePass:
    """Both passes over `examples`, each with its own run of the encoder."""
    ids = layout.ids
    source = reference.pad([torch.from_numpy(e.source) for e in examples], ids.pad)
    real = reference.pad([torch.ones(len(e.source), dtype=torch.int64) for e in examples], 0).bool()
    places = torch.arange(source.shape[1]).expand_as(source)

    contents = [torch.from_numpy(layout.content(e.target)) for e in examples]
    ar = reference.pad(contents, ids.pad)
    rows = torch.arange(ar.shape[1]).expand_as(ar)
    causal = (rows[:, None, :] <= rows[:, :, None]).expand(len(examples), -1, -1)
    memory = reference.encode(model, source, places, real)
    query = (torch.full_like(ar, ids.mask), rows + layout.query_position_offset, causal)
    h_ar, g_ar = reference.decode(model, (ar, rows, causal), query, memory, real)

    tokens, positions, kinds, ranks, queries = [], [], [], [], []
    for e in examples:
        target, masked = torch.from_numpy(e.target), torch.from_numpy(e.masked)
        keep = torch.ones(len(target), dtype=torch.bool)
        keep[masked] = False
        visible, order = keep.nonzero().squeeze(1), torch.arange(len(masked))
        tokens.append(torch.cat([target[visible], torch.full_like(masked, ids.mask), target[masked]]))
        positions.append(torch.cat([visible, masked, masked]))
        kinds.append(torch.tensor([VISIBLE] * len(visible) + [MASK] * len(masked) + [TRUTH] * len(masked)))
        ranks.append(torch.cat([torch.full_like(visible, -1), order, order]))
        queries.append(masked)
    kind, rank = reference.pad(kinds, -1), reference.pad(ranks, -1)
    query_places = reference.pad(queries, 0)
    query_real = reference.pad([torch.ones_like(q) for q in queries], 0).bool()
    see_content, see_query = content_mask(kind, rank), query_mask(kind, rank, query_real)
    memory = reference.encode(model, source, places, real)
    nar_rows = (reference.pad(tokens, ids.pad), reference.pad(positions, 0), see_content)
    aux_rows = (torch.full_like(query_places, ids.mask), query_places, see_query)
    h_nar, g_aux = reference.decode(model, nar_rows, aux_rows, memory, real)
    assert g_ar is not None and g_aux is not None
    return ReferencePass(
        length_BN=reference.length_logits(model, memory, real),
        ar_content_BTV=model.logits(h_ar),
        ar_query_BTV=model.logits(g_ar),
        nar_content_BTV=model.logits(h_nar),
        aux_query_BQV=model.logits(g_aux),
        content_visible_BTT=see_content,
        query_visible_BQT=see_query,
    )


def losses(
    model: EncoderDecoder,
    examples: Sequence[Example],
    layout: ArLayout,
    scale: Mapping[str, float],
    label_smoothing: float,
) -> tuple[Tensor, LossSums]:
    """(scaled total, sums per term), as `Janus.losses` returns them."""
    run = forward(model, examples, layout)
    ar_rows, masked_ar, nar_rows, aux_rows, ar_targets, targets = [], [], [], [], [], []
    for b, e in enumerate(examples):
        n, hidden, target = len(e.target), len(e.masked), torch.from_numpy(e.target)
        ar_rows.append(run.ar_query_BTV[b, : n - layout.shift])
        masked_ar.append(run.ar_query_BTV[b, torch.from_numpy(e.masked) - layout.shift])
        nar_rows.append(run.nar_content_BTV[b, n - hidden : n])
        aux_rows.append(run.aux_query_BQV[b, :hidden])
        ar_targets.append(target[layout.shift :])
        targets.append(target[torch.from_numpy(e.masked)])
    stacked = {"ar": torch.cat(masked_ar), "nar": torch.cat(nar_rows), "aux": torch.cat(aux_rows)}
    hidden_targets = torch.cat(targets)
    sums: LossSums = {
        "ar": cross_entropy(torch.cat(ar_rows), torch.cat(ar_targets), label_smoothing),
        "nar": cross_entropy(stacked["nar"], hidden_targets, label_smoothing),
        "aux": cross_entropy(stacked["aux"], hidden_targets, label_smoothing),
    }
    streams = ("ar", "nar", "aux")
    for name, (a, b) in KL_TERMS.items():
        sums[name] = symmetric_kl(stacked[streams[a]], stacked[streams[b]])
    classes = run.length_BN.shape[1]
    lengths = torch.tensor([len(e.target) for e in examples]).clamp(max=classes - 1)
    sums["length"] = F.cross_entropy(run.length_BN, lengths, reduction="sum")
    total = sum((scale[name] * value for name, value in sums.items()), torch.zeros(()))
    return total, {name: value.detach() for name, value in sums.items()}


def cross_entropy(logits_RV: Tensor, target_R: Tensor, label_smoothing: float) -> Tensor:
    """Sum over rows of (1 - eps) * nll + eps * mean over the vocabulary of -log p (released criterion)."""
    logp = logits_RV.log_softmax(dim=-1)
    nll = -logp.gather(1, target_R[:, None]).sum()
    return (1 - label_smoothing) * nll - label_smoothing * logp.mean(dim=-1).sum()


def symmetric_kl(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    """Sum over rows of half of KL(p||q) + KL(q||p); both sides receive gradient."""
    a, b = a_RV.log_softmax(dim=-1), b_RV.log_softmax(dim=-1)
    forward_kl = F.kl_div(b, a, reduction="sum", log_target=True)
    return 0.5 * (forward_kl + F.kl_div(a, b, reduction="sum", log_target=True))

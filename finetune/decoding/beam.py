"""Beam search from left to right over a batch of sources, all hypotheses in one step; greedy is a beam of 1.

The rules are those of common toolkits. A hypothesis ends where EOS is among the `beam` best continuations of its
source. A source is finished when `beam` hypotheses have ended, or at `max_length`, where EOS is forced. The results
are the ended hypotheses of highest sum of log-probabilities / length ** length_penalty, EOS counted in the length and
BOS not. `transformers` with `early_stopping=True` has the same rules, but that a BOS which it forces is counted, and
that a forced EOS costs nothing.

Shapes: S unfinished sources, K hypotheses of each, N = S * K, C continuations, T tokens so far, V vocabulary,
B sources of the batch, R results of each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.decoding.common import Generated, check_length
from finetune.decoding.left_to_right import ArDecoding, never_written, score_dtype
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.encoder_decoder import writing
from pretrain.models.incremental import IncrementalDecoder, StreamName
from pretrain.models.patterns import ArLayout


def beam_search(
    model: EncoderDecoder, source: SourceRows, layout: ArLayout, stream: StreamName, options: ArDecoding
) -> Generated:
    """Texts for packed sources, read from the `query` stream (JANUS) or the `content` stream (BART).

    `options.n_best` a source, best first; BOS, PAD, MASK and UNK are never written. With the `eos_first` layout BOS is
    forced behind EOS. Where fewer hypotheses exist, empty ones of score -inf fill up.

    Raises:
        ConfigError: if `max_length` exceeds the model's positions.
    """
    check_length(model, options.max_length)
    if not source.n_samples:
        return Generated([], [], 0, n_best=options.n_best)
    with writing(model):
        capacity = source.n_samples * options.beam
        state = IncrementalDecoder(model, source, layout, stream, options.max_length, capacity)
        *forced, first = layout.start
        device = model.shared.weight.device
        for token in forced:
            state.step(torch.full((source.n_samples,), token, device=device))
        ended = Ended.none(source.n_samples, options, device)
        alive_S = torch.arange(source.n_samples, device=device)
        history_SKT = torch.full((source.n_samples, 1, 1), first, device=device)
        score_SK = torch.zeros(source.n_samples, 1, device=device, dtype=score_dtype(model))
        steps = options.max_length - 1
        for step in range(1, steps + 1):
            logits_NV = state.step(history_SKT[:, :, -1].flatten())
            score_SC, parent_SC, token_SC = _continuations(
                model, logits_NV, score_SK, history_SKT.flatten(0, 1), options, end=step == steps
            )
            ends_SC = token_SC == model.ids.eos
            ended.add(alive_S, score_SC, parent_SC, ends_SC, history_SKT, options)
            kept_SK = first_open(ends_SC, options.beam)
            score_SK = score_SC.masked_fill(ends_SC, -torch.inf).gather(1, kept_SK)
            open_S = (ended.count_B[alive_S] < options.beam) & (score_SK > -torch.inf).any(dim=1)
            if not bool(open_S.any()):
                break
            parent_SK = parent_SC.gather(1, kept_SK)[open_S]
            token_SK = token_SC.gather(1, kept_SK)[open_S]
            per_source = history_SKT.shape[1]
            first_N = open_S.nonzero() * per_source
            history_SKT = history_SKT[open_S].gather(1, parent_SK[:, :, None].expand(-1, -1, history_SKT.shape[2]))
            history_SKT = torch.cat([history_SKT, token_SK[:, :, None]], dim=2)
            score_SK, alive_S = score_SK[open_S], alive_S[open_S]
            state.reorder((first_N + parent_SK).flatten())
        return ended.generated(passes=state.length)


@dataclass
class Ended:
    """The best ended hypotheses of each source so far, and how many have ended."""

    score_BR: Tensor
    tokens_BRT: Tensor
    length_BR: Tensor
    count_B: Tensor

    @classmethod
    def none(cls, sources: int, options: ArDecoding, device: torch.device, slots: int | None = None) -> "Ended":
        """slots: tokens that a text has room for; default `max_length`."""
        shape = sources, options.n_best
        worst_BR = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        length_BR = torch.zeros(shape, dtype=torch.int64, device=device)
        tokens_BRT = torch.zeros(*shape, slots or options.max_length, dtype=torch.int64, device=device)
        return cls(worst_BR, tokens_BRT, length_BR, length_BR.new_zeros(sources))

    def add(
        self,
        alive_S: Tensor,
        score_SC: Tensor,
        parent_SC: Tensor,
        ends_SC: Tensor,
        history_SKT: Tensor,
        options: ArDecoding,
    ) -> None:
        """Takes in the continuations among the `beam` best that end; of equals the older comes first."""
        time, leading = history_SKT.shape[2], slice(0, options.beam)
        ends_SC = ends_SC[:, leading] & (score_SC[:, leading] > -torch.inf)
        normal_SC = (score_SC[:, leading].double() / time**options.length_penalty).masked_fill(~ends_SC, -torch.inf)
        text_SCT = history_SKT.gather(1, parent_SC[:, leading, None].expand(-1, -1, time))
        old_SRT = self.tokens_BRT[alive_S]
        text_SCT = nn.functional.pad(text_SCT, (0, old_SRT.shape[2] - time))
        old = self.score_BR[alive_S], old_SRT, self.length_BR[alive_S]
        made = _best(old, (normal_SC, text_SCT, torch.where(ends_SC, time, 0)))
        self.score_BR[alive_S], self.tokens_BRT[alive_S], self.length_BR[alive_S] = made
        self.count_B[alive_S] += ends_SC.sum(dim=1)

    def merge(self, score_BC: Tensor, text_BCT: Tensor, length_BC: Tensor, ends_BC: Tensor) -> None:
        """As `add` for all sources and in place; what did not end has the score -inf."""
        old = self.score_BR, self.tokens_BRT, self.length_BR
        for buffer, best in zip(old, _best(old, (score_BC, text_BCT, length_BC)), strict=True):
            buffer.copy_(best)
        self.count_B += ends_BC.sum(dim=1)

    def clear(self) -> None:
        """As after `none`, in place."""
        self.score_BR.fill_(-torch.inf)
        self.length_BR.zero_()
        self.count_B.zero_()

    def generated(self, passes: int, sources: int | None = None) -> Generated:
        """The texts of the first `sources`; of all by default."""
        tokens_BRT = self.tokens_BRT[:sources].flatten(0, 1).cpu().numpy()
        lengths, scores = self.length_BR[:sources].flatten().tolist(), self.score_BR[:sources].flatten().tolist()
        tokens = [line[1:length].copy() for line, length in zip(tokens_BRT, lengths, strict=True)]
        return Generated(tokens, scores, passes, n_best=self.score_BR.shape[1])


def _continuations(
    model: EncoderDecoder, logits_NV: Tensor, score_SK: Tensor, history_NT: Tensor, options: ArDecoding, end: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to 2 `beam` continuations of each source, best first: score_SC, parent_SC (its hypothesis), token_SC.

    `end` allows EOS alone. The log-softmax is never written out: only the best logits of a row are normalised.
    Twice the beam is enough, because at most every second of them ends.
    """
    ids, sources, most = model.ids, len(score_SK), 2 * options.beam
    logits_NV = logits_NV.to(score_SK.dtype)
    total_N1 = logits_NV.logsumexp(dim=1, keepdim=True)
    if end:
        value_NC, token_NC = logits_NV[:, ids.eos, None], torch.full_like(total_N1, ids.eos, dtype=torch.int64)
    else:
        never_written(logits_NV, history_NT, ids, options)
        value_NC, token_NC = logits_NV.topk(min(most, logits_NV.shape[1]), dim=1)
    all_SC = (score_SK.view(-1, 1) + value_NC - total_N1).view(sources, -1)
    score_SC, at_SC = all_SC.topk(min(most, all_SC.shape[1]), dim=1)
    return score_SC, at_SC // token_NC.shape[1], token_NC.view(sources, -1).gather(1, at_SC)


def _best(old: tuple[Tensor, Tensor, Tensor], new: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """As many as there were of (scores, texts, lengths), best first; of equals the older."""
    score_SP, text_SPT, length_SP = (torch.cat(both, dim=1) for both in zip(old, new, strict=True))
    best_SR = score_SP.argsort(dim=1, descending=True, stable=True)[:, : old[0].shape[1]]
    text_SRT = text_SPT.gather(1, best_SR[:, :, None].expand(-1, -1, text_SPT.shape[2]))
    return score_SP.gather(1, best_SR), text_SRT, length_SP.gather(1, best_SR)


def first_open(ends_SC: Tensor, beam: int) -> Tensor:
    """Columns of the `beam` best continuations that do not end; ended ones fill up where there are too few."""
    return ends_SC.to(torch.uint8).argsort(dim=1, stable=True)[:, :beam]

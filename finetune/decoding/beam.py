"""Beam search from left to right over a batch of sources, all hypotheses in one step; greedy is a beam of 1.

The rules are those of common toolkits. A hypothesis ends where EOS is among the `beam` best continuations of its
source. A source is finished when `beam` hypotheses have ended, or at `max_length`, where EOS is forced. The result
is the ended hypothesis of highest sum of log-probabilities / length ** length_penalty, EOS counted in the length.

Shapes: S unfinished sources, K hypotheses of each, N = S * K, C continuations, T tokens so far, V vocabulary.
"""

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from finetune.decoding.common import Generated, check_length
from pretrain.config import Section
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.encoder_decoder import writing
from pretrain.models.incremental import IncrementalDecoder, StreamName
from pretrain.models.patterns import ArLayout


class BeamOptions(Section):
    """beam: hypotheses a source. length_penalty: 0 prefers short texts, 1 compares means per token.

    max_length: longest text in tokens, with BOS and EOS.
    """

    beam: int = Field(4, ge=1, le=1000)
    length_penalty: float = 1.0
    max_length: int = Field(64, ge=3)


def beam_search(
    model: EncoderDecoder, source: SourceRows, layout: ArLayout, stream: StreamName, options: BeamOptions
) -> Generated:
    """Texts for packed sources, read from the `query` stream (JANUS) or the `content` stream (BART).

    BOS, PAD, MASK and UNK are never written. With the `eos_first` layout BOS is forced behind EOS.

    Raises:
        ConfigError: if `max_length` exceeds the model's positions.
    """
    check_length(model, options.max_length)
    if not source.n_samples:
        return Generated([], [], 0)
    with writing(model):
        capacity = source.n_samples * options.beam
        state = IncrementalDecoder(model, source, layout, stream, options.max_length, capacity)
        *forced, first = layout.start
        device = model.shared.weight.device
        for token in forced:
            state.step(torch.full((source.n_samples,), token, device=device))
        ended = _Ended.none(source.n_samples, options.max_length, device)
        alive_S = torch.arange(source.n_samples, device=device)
        history_SKT = torch.full((source.n_samples, 1, 1), first, device=device)
        score_SK = torch.zeros(source.n_samples, 1, device=device, dtype=_score_dtype(model))
        steps = options.max_length - 1
        for step in range(1, steps + 1):
            logits_NV = state.step(history_SKT[:, :, -1].flatten())
            score_SC, parent_SC, token_SC = _continuations(
                model, logits_NV, score_SK, most=2 * options.beam, end=step == steps
            )
            ends_SC = token_SC == model.ids.eos
            ended.add(alive_S, score_SC, parent_SC, ends_SC, history_SKT, options)
            kept_SK = _first_open(ends_SC, options.beam)
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
class _Ended:
    """The best ended hypothesis of each source so far, and how many have ended."""

    score_B: Tensor
    tokens_BT: Tensor
    length_B: Tensor
    count_B: Tensor

    @classmethod
    def none(cls, sources: int, max_length: int, device: torch.device) -> "_Ended":
        zeros = torch.zeros(sources, dtype=torch.int64, device=device)
        tokens_BT = torch.zeros(sources, max_length, dtype=torch.int64, device=device)
        worst_B = torch.full((sources,), -torch.inf, dtype=torch.float64, device=device)
        return cls(worst_B, tokens_BT, zeros, zeros.clone())

    def add(
        self,
        alive_S: Tensor,
        score_SC: Tensor,
        parent_SC: Tensor,
        ends_SC: Tensor,
        history_SKT: Tensor,
        options: BeamOptions,
    ) -> None:
        """Takes in the continuations among the `beam` best that end."""
        time = history_SKT.shape[2]
        leading = slice(0, options.beam)
        ends_SC = ends_SC[:, leading] & (score_SC[:, leading] > -torch.inf)
        normal_SC = (score_SC[:, leading].double() / time**options.length_penalty).masked_fill(~ends_SC, -torch.inf)
        best_S, at_S = normal_SC.max(dim=1)
        parent_S = parent_SC.gather(1, at_S[:, None])[:, 0]
        better_S = best_S > self.score_B[alive_S]
        text_ST = history_SKT[torch.arange(len(alive_S), device=alive_S.device), parent_S]
        self.tokens_BT[alive_S, :time] = torch.where(better_S[:, None], text_ST, self.tokens_BT[alive_S, :time])
        self.length_B[alive_S] = torch.where(better_S, time, self.length_B[alive_S])
        self.score_B[alive_S] = torch.maximum(best_S, self.score_B[alive_S])
        self.count_B[alive_S] += ends_SC.sum(dim=1)

    def generated(self, passes: int) -> Generated:
        tokens_BT, lengths = self.tokens_BT.cpu().numpy(), self.length_B.tolist()
        tokens = [line[1:length].copy() for line, length in zip(tokens_BT, lengths, strict=True)]
        return Generated(tokens, self.score_B.tolist(), passes)


def _continuations(
    model: EncoderDecoder, logits_NV: Tensor, score_SK: Tensor, most: int, end: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to `most` continuations of each source, best first: score_SC, parent_SC (its hypothesis), token_SC.

    `end` allows EOS alone. The log-softmax is never written out: only the `most` best logits of a row are normalised.
    Twice the beam is enough, because at most every second of them ends.
    """
    ids, sources = model.ids, len(score_SK)
    logits_NV = logits_NV.to(score_SK.dtype)
    total_N1 = logits_NV.logsumexp(dim=1, keepdim=True)
    if end:
        value_NC, token_NC = logits_NV[:, ids.eos, None], torch.full_like(total_N1, ids.eos, dtype=torch.int64)
    else:
        logits_NV[:, [ids.bos, ids.pad, ids.mask, ids.unk]] = -torch.inf
        value_NC, token_NC = logits_NV.topk(min(most, logits_NV.shape[1]), dim=1)
    all_SC = (score_SK.view(-1, 1) + value_NC - total_N1).view(sources, -1)
    score_SC, at_SC = all_SC.topk(min(most, all_SC.shape[1]), dim=1)
    return score_SC, at_SC // token_NC.shape[1], token_NC.view(sources, -1).gather(1, at_SC)


def _first_open(ends_SC: Tensor, beam: int) -> Tensor:
    """Columns of the `beam` best continuations that do not end; ended ones fill up where there are too few."""
    return ends_SC.to(torch.uint8).argsort(dim=1, stable=True)[:, :beam]


def _score_dtype(model: EncoderDecoder) -> torch.dtype:
    return torch.promote_types(model.shared.weight.dtype, torch.float32)

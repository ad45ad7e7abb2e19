"""Lossless self-drafting: the NAR pattern of a network drafts a block, its AR pattern verifies it, in the same pass.

Each pass feeds the newest token and the N tokens drafted behind it. The AR queries tell what greedy decoding writes
behind each of them; drafts are accepted up to the first that differs, and that place gets what AR says there, so that
every pass writes 1 to N + 1 tokens. Behind every fed token the pass has also drafted the N tokens that follow the one
AR writes there, so the next block is ready whatever was accepted, and no pass only drafts. This is blockwise parallel
decoding (Stern et al. 2018) with the drafts of MASKs (Monea et al. 2023); JANUS needs no parameter of its own for it,
because both patterns were trained.

The text is that of greedy search. It follows from AR logits alone, and these read the same tokens by the same pattern;
drafts decide only how many passes it takes. What can differ is the order in which float sums are made: a product over
ten rows does not round as one over two. Two tokens whose logits are closer than that may change places, and the text
then goes on differently; a batch of another size can do the same to greedy search itself. In float32 logits moved by
3e-5 at most where they reach 14 (a JANUS of 9.7 M parameters); of 4,143 tokens none changed, and one was less than
1e-4 ahead of the next. In 16 bits ties are common. `compare` counts the texts that differ.

A text's length need not be predicted: a block is N tokens, wherever the text ends. JANUS never hides EOS from its NAR
pattern, so a draft hardly ever ends a text before `max_length`; AR does, where it always could.

Shapes: A texts that still grow, T fed tokens, N drafted tokens, K = N + 1, L rows, V vocabulary, D width.
"""

from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from finetune.decoding.beam import beam_search
from finetune.decoding.common import USUAL_LENGTH, Drafts, Generated, check_length
from finetune.decoding.left_to_right import ArDecoding
from pretrain.config import Section
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.encoder_decoder import writing
from pretrain.models.look_ahead import LookAhead
from pretrain.models.patterns import ArLayout


class DraftDecoding(Section):
    """block: tokens drafted at once; a pass computes (block + 1)(block + 2) rows a text, greedy search 2. So blocks pay
    where a few rows more cost little: a few texts at a time, and more of them on a GPU than on a CPU.

    max_length: longest text in tokens, with BOS and EOS. compare: write by greedy search too, and tell how long each
    took and how many texts differ; milliseconds a sentence then count both.
    """

    block: int = Field(2, ge=1, le=64)
    max_length: int = Field(USUAL_LENGTH, ge=3)
    compare: bool = False


def draft(model: EncoderDecoder, source: SourceRows, layout: ArLayout, options: DraftDecoding) -> Generated:
    """Texts for packed sources: those of `beam_search` on the query stream with a beam of 1, up to ties (see above).

    Score: mean log-probability of the tokens with EOS, as there. BOS, PAD, MASK and UNK are never written.

    Raises:
        ConfigError: if `max_length` exceeds the model's positions.
    """
    started = perf_counter()
    made = _draft(model, source, layout, options)
    if not options.compare or made.drafts is None:
        return made
    seconds = perf_counter() - started  # tokens are on the host, so the device is done
    greedy = beam_search(model, source, layout, "query", ArDecoding(beam=1, max_length=options.max_length))
    seconds_greedy = perf_counter() - started - seconds
    differ = sum(not np.array_equal(a, b) for a, b in zip(made.tokens, greedy.tokens, strict=True))
    return replace(made, drafts=replace(made.drafts, compared=(seconds, seconds_greedy, differ)))


def _draft(model: EncoderDecoder, source: SourceRows, layout: ArLayout, options: DraftDecoding) -> Generated:
    check_length(model, options.max_length)
    if not source.n_samples:
        return Generated([], [], 0)
    ids, block, most = model.ids, options.block, options.max_length - 2
    device = model.shared.weight.device
    texts = [_Text([], []) for _ in range(source.n_samples)]
    accepted = np.zeros(block + 1, np.int64)
    passes = text_passes = 0
    with writing(model):
        fed, sure = max(block + 1, len(layout.start)), len(layout.start)
        state = LookAhead(model, source, layout, options.max_length, fed, block)
        grows_A = np.arange(source.n_samples)
        tokens_AT = torch.tensor(layout.start, device=device).expand(len(grows_A), -1)
        while len(grows_A):
            passes, text_passes = passes + 1, text_passes + len(grows_A)
            places = torch.tensor([most - len(texts[text].tokens) for text in grows_A], device=device)
            token_ALK, log_p_ALK = _likeliest(model, state.step(grows_A, tokens_AT)[:, sure - 1 :], places)
            best_AL = token_ALK[:, :, 0]
            agree_A = (tokens_AT[:, sure:] == best_AL[:, :-1]).cumprod(dim=1).sum(dim=1)
            count_A = agree_A.cpu().numpy()
            rows = zip(grows_A, best_AL.cpu().numpy(), log_p_ALK[:, :, 0].cpu().numpy(), count_A, strict=True)
            for text, best_L, log_p_L, count in rows:
                written = texts[text].add(best_L[: count + 1], log_p_L[: count + 1], ids.eos)
                if passes > 1:
                    accepted[min(count, written)] += 1
            state.keep(grows_A, sure + count_A)
            tokens_AK, sure = token_ALK[torch.arange(len(grows_A), device=device), agree_A], 1
            open_A = np.flatnonzero([not texts[text].ended for text in grows_A])
            grows_A, tokens_AT = grows_A[open_A], tokens_AK[torch.from_numpy(open_A).to(device)]
    drafts = Drafts(tuple(accepted.tolist()), sum(len(text.scores) for text in texts), text_passes)
    tokens = [np.array(text.tokens, dtype=np.int64) for text in texts]
    return Generated(tokens, [float(np.mean(text.scores)) for text in texts], passes, drafts=drafts)


@dataclass
class _Text:
    """tokens: without EOS. scores: log-probabilities, one more where the text has ended."""

    tokens: list[int]
    scores: list[float]

    @property
    def ended(self) -> bool:
        return len(self.scores) > len(self.tokens)

    def add(self, best_L: np.ndarray, log_p_L: np.ndarray, eos: int) -> int:
        """Appends tokens up to the first EOS; returns how many, EOS counted."""
        ends = np.flatnonzero(best_L == eos)
        count = int(ends[0]) + 1 if len(ends) else len(best_L)
        self.scores += log_p_L[:count].tolist()
        self.tokens += best_L[: count - bool(len(ends))].tolist()
        return count


def _likeliest(model: EncoderDecoder, h_ALKD: Tensor, places_A: Tensor) -> tuple[Tensor, Tensor]:
    """(token_ALK int64, log-probability_ALK): the likeliest tokens; EOS where a text has no place for another token.

    places_A: tokens that each text may still get; the one of row i and rank r is number i + r of them. One call serves
    both patterns: the head's weight is read from memory once, and for the few rows of a text that is what it costs.
    """
    ids = model.ids

    def best(logits_LV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_LV = logits_LV.float() if logits_LV.dtype.itemsize < 4 else logits_LV
        total_L, end_L = logits_LV.logsumexp(dim=1), logits_LV[:, ids.eos].clone()
        logits_LV[:, ids.never_written] = -torch.inf
        found = logits_LV.max(dim=1)
        return found.indices, found.values - total_L, end_L - total_L

    shape = h_ALKD.shape[:3]
    token_ALK, log_p_ALK, end_ALK = (x.view(shape) for x in model.head(h_ALKD.flatten(0, 2), reduction=best))
    row_L, rank_K = (torch.arange(n, device=h_ALKD.device) for n in shape[1:])
    full_ALK = row_L[:, None] + rank_K >= places_A[:, None, None]
    return token_ALK.masked_fill(full_ALK, ids.eos), torch.where(full_ALK, end_ALK, log_p_ALK)

"""Lossless self-drafting: the NAR pattern of a network drafts a block, its AR pattern verifies it, in the same pass.

Each pass feeds the newest token and the N tokens drafted behind it. The AR queries tell what greedy decoding writes
behind each of them; drafts are accepted up to the first that differs, and that place gets what AR says there, so that
every pass writes 1 to N + 1 tokens. Behind every fed token the pass has also drafted the N tokens that follow the one
AR writes there, so the next block is ready whatever was accepted, and no pass only drafts. Blockwise parallel decoding (Stern et al. 2018) with the drafts of MASKs (Monea et al. 2023), without a
parameter of its own: JANUS has trained both patterns.

The text is that of greedy search. It follows from AR logits alone, and these read the same tokens by the same pattern;
drafts decide only how many passes it takes. What can differ is the order in which float sums are made: a product
over ten rows does not round as one over two. In float32 that moves a logit by about 1e-6 of its size, so two
tokens that are closer than this may change places, and the text then goes on differently; a batch of another size
can do the same to greedy search itself. `compare` counts such texts.

A text's length need not be predicted: a block is N tokens, wherever the text ends. JANUS never hides EOS from its NAR
pattern, so drafts hardly ever end a text; AR does, where it always could.

Shapes: A texts that still grow, T fed tokens, N drafted tokens, L rows, V vocabulary, D width.
"""

from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from finetune.decoding.beam import beam_search
from finetune.decoding.common import Drafts, Generated, check_length, most_likely
from finetune.decoding.left_to_right import ArDecoding
from pretrain.config import Section
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.encoder_decoder import writing
from pretrain.models.look_ahead import LookAhead
from pretrain.models.patterns import ArLayout


class DraftDecoding(Section):
    """block: tokens drafted at once; a pass computes (block + 1)(block + 2) rows a text. max_length: longest text in
    tokens, with BOS and EOS.

    compare: write by greedy search too, and tell how long each took and how many texts differ.
    """

    block: int = Field(2, ge=1, le=64)
    max_length: int = Field(64, ge=3)
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
            h_ATD, ahead_ATND = state.step(grows_A, tokens_AT)
            places = [most - len(texts[text].tokens) for text in grows_A]
            best_AL, log_p_AL = _greedy(model, h_ATD[:, sure - 1 :], torch.tensor(places, device=device))
            agree_AN = tokens_AT[:, sure:] == best_AL[:, :-1]
            agree_A = agree_AN.cumprod(dim=1).sum(dim=1)
            count_A = agree_A.cpu().numpy()
            rows = zip(grows_A, best_AL.cpu().numpy(), log_p_AL.cpu().numpy(), count_A, strict=True)
            for text, best_L, log_p_L, count in rows:
                written = texts[text].add(best_L[: count + 1], log_p_L[: count + 1], ids.eos)
                if passes > 1:
                    accepted[min(count, written)] += 1
            state.keep(grows_A, sure + count_A)
            open_A = np.array([not texts[text].ended for text in grows_A])
            chosen = torch.from_numpy(np.flatnonzero(open_A)).to(device)
            at_A = agree_A[chosen]
            ahead_AND = ahead_ATND[chosen, sure - 1 + at_A]
            newest_A1 = best_AL[chosen, at_A][:, None]
            grows_A, sure = grows_A[open_A], 1
            if len(grows_A):
                drafted_L, _ = most_likely(model, ahead_AND.flatten(0, 1), [ids.bos, ids.pad, ids.mask, ids.unk])
                tokens_AT = torch.cat([newest_A1, drafted_L.view(-1, block)], dim=1)
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


def _greedy(model: EncoderDecoder, h_ALD: Tensor, places_A: Tensor) -> tuple[Tensor, Tensor]:
    """(token_AL int64, log-probability_AL): what greedy search writes; EOS where no place is left for another token.

    places_A: tokens that each text may still get; row i is the one after i of them.
    """
    ids = model.ids

    def best(logits_LV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_LV = logits_LV.float() if logits_LV.dtype.itemsize < 4 else logits_LV
        total_L, end_L = logits_LV.logsumexp(dim=1), logits_LV[:, ids.eos].clone()
        logits_LV[:, [ids.bos, ids.pad, ids.mask, ids.unk]] = -torch.inf
        found = logits_LV.max(dim=1)
        return found.indices, found.values - total_L, end_L - total_L

    shape = h_ALD.shape[:2]
    token_AL, log_p_AL, end_AL = (x.view(shape) for x in model.head(h_ALD.flatten(0, 1), reduction=best))
    full_AL = torch.arange(shape[1], device=h_ALD.device) >= places_A[:, None]
    return token_AL.masked_fill(full_AL, ids.eos), torch.where(full_AL, end_AL, log_p_AL)

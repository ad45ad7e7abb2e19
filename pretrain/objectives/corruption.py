"""How a clean text becomes an encoder input and a set of hidden decoder positions.

Spans are hidden in the decoder; each of them also collapses to one MASK in the encoder with probability
encoder_ratio / decoder_ratio, so the decoder hides a superset of the encoder (JANUS, section 3.3, Fig. 3).
"""

import numpy as np
from pydantic import model_validator

from pretrain.config import Fraction, Positive, Section
from pretrain.models.ids import SpecialIds
from pretrain.objectives import spans
from pretrain.objectives.base import Example


class SpanOptions(Section):
    """mean_span: Poisson mean, in tokens (or words).

    exact: disjoint spans that reach the ratio; false: the released sampler, whose overlaps hide less (26.7 and 14 % for
    ratios of 0.3 and 0.15 with Poisson(3)).
    whole_words: spans begin and end at words. insertions: zero-length spans insert a MASK in the encoder (BART).
    """

    mean_span: Positive = 2.0
    exact: bool = True
    whole_words: bool = False
    insertions: bool = False


class Corruption(SpanOptions):
    """encoder_ratio, decoder_ratio: share of tokens (or words) hidden on each side."""

    encoder_ratio: Fraction = 0.3
    decoder_ratio: Fraction = 0.5

    @model_validator(mode="after")
    def _decoder_hides_more(self) -> "Corruption":
        if self.encoder_ratio > self.decoder_ratio:
            raise ValueError(
                f"`encoder_ratio` must be at most `decoder_ratio` ({self.decoder_ratio}), got {self.encoder_ratio}"
            )
        return self


class Infilling(SpanOptions):
    """ratio: share of tokens (or words) in spans that the encoder sees as one MASK each.

    random_masks: share of those MASKs with a random token instead. shuffle: sentences in random order.
    """

    ratio: Fraction = 0.15
    mean_span: Positive = 3.0
    random_masks: Fraction = 0.0
    shuffle: bool = True


def corrupt_text(
    tokens: np.ndarray,
    options: Corruption,
    ids: SpecialIds,
    word_starts: np.ndarray | None,
    rng: np.random.Generator,
) -> Example:
    """Example of a text without special ids: source with some spans collapsed, target with the masked positions.

    tokens: int [N]. word_starts: bool [vocabulary], needed for `whole_words`.
    """
    tokens = tokens.astype(np.int64)
    hidden = draw_spans(tokens, options.decoder_ratio, options, word_starts, rng)
    share = options.encoder_ratio / options.decoder_ratio if options.decoder_ratio else 0.0
    both = rng.random(len(hidden.starts)) < share
    both[hidden.lengths == 0] = options.insertions
    collapsed = spans.infill(tokens, spans.Spans(hidden.starts[both], hidden.lengths[both]), ids.mask)
    return Example(enclose(collapsed, ids), enclose(tokens, ids), hidden.indices() + 1)


def infill_text(
    tokens: np.ndarray,
    sentences: np.ndarray,
    options: Infilling,
    ids: SpecialIds,
    word_starts: np.ndarray | None,
    vocabulary: int | None,
    rng: np.random.Generator,
) -> Example:
    """Example of a text that the decoder has to write as a whole: nothing is `masked` by itself.

    sentences: int [.], where each begins. vocabulary: number of ids, needed for `random_masks`.
    """
    tokens = tokens.astype(np.int64)
    pieces = np.split(tokens, sentences[1:])
    shuffled = np.concatenate([pieces[i] for i in rng.permutation(len(pieces))]) if options.shuffle else tokens
    hidden = draw_spans(shuffled, options.ratio, options, word_starts, rng)
    if not options.insertions:
        hidden = spans.Spans(*(x[hidden.lengths > 0] for x in hidden))
    source = spans.infill(shuffled, hidden, ids.mask)
    masks = np.flatnonzero(source == ids.mask)
    other = masks[rng.random(len(masks)) < options.random_masks]
    source[other] = _ordinary_tokens(len(other), ids, vocabulary, rng)
    return Example(enclose(source, ids), enclose(tokens, ids), np.empty(0, np.int64))


def draw_spans(
    tokens: np.ndarray, ratio: float, how: SpanOptions, word_starts: np.ndarray | None, rng: np.random.Generator
) -> spans.Spans:
    """Spans over about `ratio` of the tokens, or of the words that they are."""
    draw = spans.disjoint_spans if how.exact else spans.released_spans
    if not how.whole_words:
        return draw(len(tokens), ratio, how.mean_span, rng)
    if word_starts is None:
        raise ValueError("`whole_words` needs a tokenizer that marks word starts, got none")
    begins = word_starts[tokens]
    begins[:1] = True
    return spans.in_words(draw(int(begins.sum()), ratio, how.mean_span, rng), begins)


def enclose(tokens: np.ndarray, ids: SpecialIds) -> np.ndarray:
    """Tokens between BOS and EOS."""
    return np.concatenate([[ids.bos], tokens, [ids.eos]])


def _ordinary_tokens(count: int, ids: SpecialIds, vocabulary: int | None, rng: np.random.Generator) -> np.ndarray:
    """Ids drawn from those that are not special."""
    special = sorted({ids.bos, ids.pad, ids.eos, ids.mask, ids.unk})
    drawn = rng.integers(0, vocabulary - len(special), count) if vocabulary and count else np.empty(0, np.int64)
    for number in special:  # increasing, so that each one passed moves the rest up
        drawn = drawn + (drawn >= number)
    return drawn

"""What beam search and sampling share: their options, and the tokens that a hypothesis may not go on with.

Shapes: N hypotheses, T tokens of each so far, W n-grams of each, G tokens of an n-gram, V vocabulary.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor

from finetune.decoding.common import USUAL_LENGTH
from pretrain.config import Positive, Section
from pretrain.models import EncoderDecoder, SpecialIds


class ArDecoding(Section):
    """beam: hypotheses a source. length_penalty: 0 prefers short texts, 1 compares means per token.

    max_length: longest text in tokens, with BOS and EOS. no_repeat_ngram: no sequence of so many tokens comes twice in
    a text; 0: any may. n_best: texts a source; of a beam the best ones, at most `beam`.

    sample: draw each token from the model's distribution in place of a search. Its logits are divided by `temperature`,
    and where `top_k` is not 0 only so many of the likeliest tokens remain. seed: every text of every source has random
    numbers of its own, so that neither other sources nor other texts change it.
    """

    beam: int = Field(4, ge=1, le=1000)
    length_penalty: float = 1.0
    max_length: int = Field(USUAL_LENGTH, ge=3)
    no_repeat_ngram: int = Field(0, ge=0)
    n_best: int = Field(1, ge=1, le=1000)
    sample: bool = False
    temperature: Positive = 1.0
    top_k: int = Field(0, ge=0)
    seed: int = Field(1, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _fit_together(self) -> "ArDecoding":
        """Refuses what would not be read; defaults pass, because a section that was saved in full holds them all."""
        for name in ("beam",) if self.sample else ("temperature", "top_k", "seed"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` must not be given {'with' if self.sample else 'without'} `sample`")
        if not self.sample and self.n_best > self.beam:
            raise ValueError(f"`n_best` must be at most `beam`, {self.beam}, unless with `sample`, got {self.n_best}")
        return self


def never_written(logits_NV: Tensor, history_NT: Tensor, ids: SpecialIds, options: ArDecoding) -> None:
    """Sets to -inf, in place, what must not follow the history: special ids but EOS, and n-grams that were there."""
    logits_NV[:, ids.never_written] = -torch.inf
    if options.no_repeat_ngram:
        row_R, token_R = repeats(history_NT, options.no_repeat_ngram)
        logits_NV[row_R, token_R] = -torch.inf


def repeats(history_NT: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(row, token) of every token that would complete an n-gram of `size` tokens that its row holds already.

    As in `transformers` and fairseq. The history has BOS in front and no EOS, so that no text is kept from ending.
    """
    if history_NT.shape[1] < size:
        return history_NT.new_empty(0), history_NT.new_empty(0)
    ngrams_NWG = history_NT.unfold(1, size, 1)
    last_NG = history_NT[:, history_NT.shape[1] - size + 1 :]
    again_NW = (ngrams_NWG[:, :, :-1] == last_NG[:, None]).all(dim=2)
    row_R, at_R = again_NW.nonzero(as_tuple=True)
    return row_R, ngrams_NWG[row_R, at_R, size - 1]


def score_dtype(model: EncoderDecoder) -> torch.dtype:
    """In which log-probabilities are added up: float32 or wider."""
    return torch.promote_types(model.shared.weight.dtype, torch.float32)

"""JANUS: one network learns AR, NAR and AUX decoding together, tied by symmetric KLs (JANUS, section 3).

AR predicts from the query stream, NAR from the content stream's MASK rows, AUX from a query stream that sees the
truth of earlier masked tokens and the MASKs of the others. All four streams of all samples share one packed buffer.

Terms: ar, nar, aux (cross-entropy), kl_ar_aux, kl_nar_aux, kl_ar_nar (half the sum of both directions), length.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.config import Fraction, ModelConfig, Positive, Rate, Section
from pretrain.models.encoder_decoder import EncoderDecoder
from pretrain.models.ids import SpecialIds
from pretrain.models.patterns import ArLayout, ar_two_stream, nar_aux
from pretrain.models.rows import SourceRows
from pretrain.objectives import spans
from pretrain.objectives.base import Example, LossSums, Preview, from_preset
from pretrain.objectives.batch import SampleStreams, TokenBatch, pack_batch, packed_losses, previews
from pretrain.objectives.corruption import Corruption, corrupt_text

CE_TERMS = ("ar", "nar", "aux")
KL_TERMS = {"kl_ar_aux": (0, 2), "kl_nar_aux": (1, 2), "kl_ar_nar": (0, 1)}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "ar_query_position_offset": 0,
        "share_encoder": False,
        "weights": {"nar": 0.5, "aux": 0.5, "length": 0.1, "kl_ar_aux": 3.0, "kl_nar_aux": 1.0, "kl_ar_nar": 1.0},
        "label_smoothing": 0.1,
    },
    "released_pretrain": {
        "ar_layout": "eos_first",
        "share_encoder": False,
        "weights": {"ar": 0.5, "nar": 0.5, "aux": 0.5, "kl_ar_aux": 0.5, "kl_nar_aux": 0.5},
        "ce_reduction": "target_tokens",
        "kl_reduction": "target_tokens",
        "corruption": {
            "encoder_ratio": 0.15,
            "decoder_ratio": 0.3,
            "mean_span": 3.0,
            "exact": False,
            "whole_words": True,
            "insertions": True,
        },
        "pair_masking": "uniform",
    },
}


class JanusWeights(Section):
    """Factor of each term. The paper's KL directions have weight 1 each, which is 2 for half their sum."""

    ar: float = Field(1.0, ge=0.0)
    nar: float = Field(1.0, ge=0.0)
    aux: float = Field(1.0, ge=0.0)
    kl_ar_aux: float = Field(2.0, ge=0.0)
    kl_nar_aux: float = Field(2.0, ge=0.0)
    kl_ar_nar: float = Field(0.0, ge=0.0)
    length: float = Field(0.0, ge=0.0)


class JanusOptions(Section):
    """Options of the objective. `preset` fills in what is not given:

    * `paper` (default): unit weights, no AR-NAR KL, no length loss; 30 % of the tokens hidden in the encoder and 50 %
      in the decoder, in disjoint Poisson(2) spans (JANUS, Eq. 1-5 and sections 3.3, 4.2).
    * `released`: the translation code. Half weights for NAR and AUX, KLs 3, 1 and 1 with the AR-NAR one, length 0.1,
      label smoothing 0.1, query rows of AR one position behind those of NAR. It trains on pairs; texts are corrupted
      as in `paper`.
    * `released_pretrain`: the pre-training code. Half weights for every cross-entropy and both KLs, all divided by the
      number of target tokens; EOS first as in BART; spans of Poisson(3) whole words with a budget of 30 %, each of them
      in the encoder too with probability 1/2, which overlaps reduce to 27 % in the decoder and 14 % in the encoder.
      Not here: it turns half of the sources around a random place, and its decoder's MASK is <unk>.

    Both released codes run the encoder twice.

    ar_query_position_offset: 1 aligns AR rows of `bos_first` with NAR, 0 is the released code; null: aligned.
    share_encoder: one encoder pass for all patterns; false draws dropout twice, as the released code does.
    ce_reduction, kl_reduction: what the sums of ar, nar and aux, and those of the KLs, are divided by: each by its
    `own` count, or all by the number of `target_tokens`.
    pair_masking: how fine-tuning pairs are masked: released span sampler at `pair_ratio`, or `uniform` (CMLM).
    """

    name: Literal["janus"] = "janus"
    preset: Literal["paper", "released", "released_pretrain"] = "paper"
    ar_layout: Literal["bos_first", "eos_first"] = "bos_first"
    ar_query_position_offset: int | None = Field(None, ge=0, le=1)
    share_encoder: bool = True
    weights: JanusWeights = JanusWeights()
    ce_reduction: Literal["own", "target_tokens"] = "own"
    kl_reduction: Literal["own", "target_tokens"] = "own"
    label_smoothing: Rate = 0.0
    corruption: Corruption = Corruption()
    pair_masking: Literal["spans", "uniform"] = "spans"
    pair_ratio: Fraction = 0.7
    pair_mean_span: Positive = 2.0

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        return from_preset(values, PRESETS)


class Janus:
    """The objective on packed rows."""

    def __init__(self, options: JanusOptions, ids: SpecialIds, word_starts: np.ndarray | None, model: ModelConfig):
        self.options, self.ids, self.word_starts, self.model = options, ids, word_starts, model
        self.weights: Mapping[str, float] = options.weights.model_dump()
        aligned = ArLayout.aligned(options.ar_layout, ids)
        offset = options.ar_query_position_offset
        self.layout = aligned if offset is None else ArLayout(options.ar_layout, offset, ids)
        self.modes: Sequence[str] = ("ar", "nar")

    def corrupt(self, tokens: np.ndarray, sentences: np.ndarray, rng: np.random.Generator) -> Example:
        """Spans hidden in the decoder, some of them in the encoder too (JANUS, section 3.3)."""
        return corrupt_text(tokens, self.options.corruption, self.ids, self.word_starts, rng)

    def corrupt_pair(self, source: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Example:
        o, n = self.options, len(target)
        if o.pair_masking == "uniform":
            return Example(source, target, 1 + spans.uniform_mask(n - 2, rng) if n > 2 else np.empty(0, np.int64))
        return Example(source, target, spans.span_mask(n, o.pair_ratio, o.pair_mean_span, rng))

    def collate(self, examples: Sequence[Example]) -> TokenBatch:
        sources = [example.source for example in examples]
        twice = 1 if self.options.share_encoder else 2
        source = SourceRows.pack(sources * twice)
        last = (twice - 1) * len(examples)
        samples = [
            self._streams(example, source.memory_range(index), source.memory_range(last + index))
            for index, example in enumerate(examples)
        ]
        return pack_batch(examples, samples, source, len(CE_TERMS), len(CE_TERMS), self.model.length_classes)

    def counts(self, batch: TokenBatch) -> dict[str, int]:
        own = dict(zip(CE_TERMS, batch.term_counts, strict=True))
        everything = batch.term_counts[0]
        ce = own if self.options.ce_reduction == "own" else dict.fromkeys(CE_TERMS, everything)
        pairs = len(batch.tuple_PK) if self.options.kl_reduction == "own" else everything
        return {**ce, **dict.fromkeys(KL_TERMS, pairs), "length": batch.n_samples}

    def losses(self, model: EncoderDecoder, batch: TokenBatch, scale: Mapping[str, float]) -> tuple[Tensor, LossSums]:
        return packed_losses(model, batch, scale, CE_TERMS, KL_TERMS, self.options.label_smoothing)

    def preview(self, model: EncoderDecoder, batch: TokenBatch, limit: int) -> list[Preview]:
        return previews(model, batch, CE_TERMS, limit)

    def _streams(self, example: Example, ar_memory: tuple[int, int], nar_memory: tuple[int, int]) -> SampleStreams:
        target, masked = example.target, example.masked
        content, query = ar_two_stream(target, ar_memory, self.layout, term=0)
        nothing, shift = np.empty(0, np.int64), self.layout.shift
        streams, positions = [content, query], [nothing, np.arange(shift, len(target))]
        aligned = []
        if len(masked):
            hidden, aux = nar_aux(target, masked, nar_memory, self.ids.mask, nar_term=1, aux_term=2)
            streams += [hidden, aux]
            positions += [masked, masked]
            ranks = np.arange(len(masked))
            aligned = [(query, masked - shift), (hidden, ranks), (aux, ranks)]
        return SampleStreams(streams, positions, aligned)

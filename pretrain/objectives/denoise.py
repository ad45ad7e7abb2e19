"""Denoise: plain BART text infilling on a single causal stream, the control of every comparison (BART, section 2.2)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from pretrain.config import ModelConfig, Rate, Section
from pretrain.models.encoder_decoder import EncoderDecoder
from pretrain.models.ids import SpecialIds
from pretrain.models.patterns import ArLayout, causal
from pretrain.models.rows import SourceRows
from pretrain.objectives.base import Example, LossSums, Preview
from pretrain.objectives.batch import SampleStreams, TokenBatch, pack_batch, packed_losses, previews
from pretrain.objectives.corruption import Corruption, corrupt_text

CE_TERMS = ("ar",)


class DenoiseOptions(Section):
    """Options; the defaults are BART's: 30 % of the tokens in Poisson(3) spans, EOS first in the decoder."""

    name: Literal["denoise"] = "denoise"
    ar_layout: Literal["bos_first", "eos_first"] = "eos_first"
    label_smoothing: Rate = 0.0
    length_weight: float = Field(0.0, ge=0.0)
    corruption: Corruption = Corruption(encoder_ratio=0.3, decoder_ratio=0.3, mean_span=3.0, insertions=True)


class Denoise:
    """The objective on packed rows; terms: ar, length."""

    def __init__(self, options: DenoiseOptions, ids: SpecialIds, word_starts: np.ndarray | None, model: ModelConfig):
        self.options, self.ids, self.word_starts, self.model = options, ids, word_starts, model
        self.weights: Mapping[str, float] = {"ar": 1.0, "length": options.length_weight}
        self.layout = ArLayout.aligned(options.ar_layout, ids)
        self.modes: Sequence[str] = ("causal",)

    def corrupt(self, tokens: np.ndarray, sentences: np.ndarray, rng: np.random.Generator) -> Example:
        return corrupt_text(tokens, self.options.corruption, self.ids, self.word_starts, rng)

    def corrupt_pair(self, source: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Example:
        return Example(source, target, np.empty(0, np.int64))

    def collate(self, examples: Sequence[Example]) -> TokenBatch:
        source = SourceRows.pack([example.source for example in examples])
        samples = []
        for index, example in enumerate(examples):
            stream = causal(example.target, source.memory_range(index), self.layout, term=0)
            samples.append(SampleStreams([stream], [np.arange(self.layout.shift, len(example.target))], []))
        return pack_batch(examples, samples, source, len(CE_TERMS), 1, self.model.length_classes)

    def counts(self, batch: TokenBatch) -> dict[str, int]:
        return {"ar": batch.term_counts[0], "length": batch.n_samples}

    def losses(self, model: EncoderDecoder, batch: TokenBatch, scale: Mapping[str, float]) -> tuple[Tensor, LossSums]:
        return packed_losses(model, batch, scale, CE_TERMS, {}, self.options.label_smoothing)

    def preview(self, model: EncoderDecoder, batch: TokenBatch, limit: int) -> list[Preview]:
        return previews(model, batch, CE_TERMS, limit)

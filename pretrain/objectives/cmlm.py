"""CMLM: masked positions predicted in parallel, hidden uniformly (Ghazvininejad et al. 2019): the NAR control."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from pretrain.config import ModelConfig, Rate, Section
from pretrain.models.encoder_decoder import EncoderDecoder
from pretrain.models.ids import SpecialIds
from pretrain.models.patterns import ArLayout, nar
from pretrain.models.rows import SourceRows
from pretrain.objectives import spans
from pretrain.objectives.base import Example, LossSums, Preview
from pretrain.objectives.batch import SampleStreams, TokenBatch, pack_batch, packed_losses, previews
from pretrain.objectives.corruption import Corruption, corrupt_text

CE_TERMS = ("nar",)


class MaskedOptions(Section):
    """What every objective with k ~ uniform hidden tokens has. In pre-training the encoder sees infilled spans."""

    label_smoothing: Rate = 0.0
    length_weight: float = Field(0.1, ge=0.0)
    corruption: Corruption = Corruption(encoder_ratio=0.3, decoder_ratio=0.3)


class CmlmOptions(MaskedOptions):
    """Options."""

    name: Literal["cmlm"] = "cmlm"


class Cmlm:
    """The objective on packed rows; terms: nar, length."""

    def __init__(self, options: MaskedOptions, ids: SpecialIds, word_starts: np.ndarray | None, model: ModelConfig):
        self.options, self.ids, self.word_starts, self.model = options, ids, word_starts, model
        self.weights: Mapping[str, float] = {"nar": 1.0, "length": options.length_weight}
        self.layout = ArLayout.aligned("bos_first", ids)
        self.modes: Sequence[str] = ("nar",)

    def corrupt(self, tokens: np.ndarray, sentences: np.ndarray, rng: np.random.Generator) -> Example:
        example = corrupt_text(tokens, self.options.corruption, self.ids, self.word_starts, rng)
        return self.corrupt_pair(example.source, example.target, rng)

    def corrupt_pair(self, source: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Example:
        n = len(target) - 2
        return Example(source, target, 1 + spans.uniform_mask(n, rng) if n else np.empty(0, np.int64))

    def collate(self, examples: Sequence[Example]) -> TokenBatch:
        source = SourceRows.pack([example.source for example in examples])
        samples = []
        for index, example in enumerate(examples):
            if len(example.masked):
                memory = source.memory_range(index)
                stream = nar(example.target, example.masked, memory, self.ids.mask, term=0)
                samples.append(SampleStreams([stream], [example.masked], []))
            else:
                samples.append(SampleStreams([], [], []))
        return pack_batch(examples, samples, source, len(CE_TERMS), 1, self.model.length_classes)

    def counts(self, batch: TokenBatch) -> dict[str, int]:
        return {"nar": batch.term_counts[0], "length": batch.n_samples}

    def losses(self, model: EncoderDecoder, batch: TokenBatch, scale: Mapping[str, float]) -> tuple[Tensor, LossSums]:
        return packed_losses(model, batch, scale, CE_TERMS, {}, self.options.label_smoothing)

    def preview(self, model: EncoderDecoder, batch: TokenBatch, limit: int) -> list[Preview]:
        return previews(model, batch, CE_TERMS, limit)

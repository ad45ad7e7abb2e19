"""LPLM, ELMER's pre-training: all tokens at once, each from the decoder layer that a permutation gives it.

The decoder reads MASKs alone. Every token of a text draws the layer at which it leaves, k times a step; its state there
predicts it and is copied to the layers above for the others to read (ELMER, sections 4.1 and 4.2). What copies have in
common is computed once, what has left is never computed again (`pretrain/models/exits.py`).

Terms: lplm (cross-entropy over tokens and copies), length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.config import ModelConfig, Rate, Section
from pretrain.models import EncoderDecoder, ExitRows, ExitSample, SourceRows, VocabTargets, pack_exits
from pretrain.models.ids import SpecialIds
from pretrain.models.patterns import ArLayout, FirstRow
from pretrain.models.soft_exit import likeliest
from pretrain.objectives.base import Example, LossSums, Preview, from_preset
from pretrain.objectives.batch import TokenBatch, length_loss, target_fields
from pretrain.objectives.corruption import Infilling, infill_text
from pretrain.objectives.from_masks import RowsPerText, check_rows, joined, mask_previews, padded_targets, row_labels

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "copies": 1,
        "first_row": "bos",
        "rows": "longest",
        "detach_copied_state": True,
        "corruption": {
            "ratio": 0.3,
            "mean_span": 3.5,
            "exact": False,
            "whole_words": True,
            "insertions": True,
            "random_masks": 0.1,
        },
    },
}


class LplmOptions(Section):
    """Options of the objective. `preset` fills in what is not given:

    * `paper` (default): 10 permutations a step, a MASK in every row, sentences shuffled and 15 % of the tokens in
      Poisson(3) spans; gradients flow through copied states, of which the paper does not speak (ELMER, section 5.1).
    * `released`: one permutation a step (its ten are ten epochs), BOS in the first row, copied states detached; 30 % of
      the words in overlapping Poisson(3.5) spans, with insertions, a tenth of the MASKs random. Its short samples have
      MASK rows up to the longest of their batch, which others read: what a text gets depends on its neighbours.

    copies: k, the permutations of a step. first_row: what the row that predicts the first token reads.
    rows: see `rows_per_text`.
    """

    name: Literal["lplm"] = "lplm"
    preset: Literal["paper", "released"] = "paper"
    copies: int = Field(10, ge=1, le=1000)
    first_row: FirstRow = "mask"
    rows: RowsPerText = "target"
    detach_copied_state: bool = False
    label_smoothing: Rate = 0.0
    length_weight: float = Field(0.0, ge=0.0)
    corruption: Infilling = Infilling()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        return from_preset(values, PRESETS)


@dataclass(frozen=True)
class ExitExample(Example):
    """exits: int [k, N + 1], from 1: where each token after BOS leaves in each copy. Nothing is `masked` by itself."""

    exits: np.ndarray


class Lplm:
    """The objective on packed rows; a row's target is the token one further, as `first_row` stands for BOS."""

    def __init__(self, options: LplmOptions, ids: SpecialIds, word_starts: np.ndarray | None, model: ModelConfig):
        check_rows(options.rows, model)
        self.options, self.ids, self.word_starts, self.model = options, ids, word_starts, model
        self.weights: Mapping[str, float] = {"lplm": 1.0, "length": options.length_weight}
        self.layout = ArLayout.aligned("bos_first", ids)
        self.modes: Sequence[str] = ("hard_exit",)

    def corrupt(self, tokens: np.ndarray, sentences: np.ndarray, rng: np.random.Generator) -> ExitExample:
        """The encoder reads the sentences in another order, with spans collapsed (ELMER, section 5.1)."""
        how, vocabulary = self.options.corruption, self.model.vocab_size
        example = infill_text(tokens, sentences, how, self.ids, self.word_starts, vocabulary, rng)
        return self.corrupt_pair(example.source, example.target, rng)

    def corrupt_pair(self, source: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> ExitExample:
        shape = self.options.copies, len(target) - 1
        exits = rng.integers(1, self.model.decoder_layers + 1, shape)
        return ExitExample(source, target, np.empty(0, np.int64), exits)

    def collate(self, examples: Sequence[Example]) -> TokenBatch:
        source = SourceRows.pack([example.source for example in examples])
        targets = padded_targets(examples, self.options.rows, self.ids.pad)
        samples = [
            self._sample(source.memory_range(index), _exits(example, len(target)))
            for index, (example, target) in enumerate(zip(examples, targets, strict=True))
        ]
        rows = pack_exits(samples, self.model.decoder_layers, source.mask.n_rows, self.options.detach_copied_state)
        target_L = joined(targets)[rows.out_L]
        row_sample_R, row_position_R = row_labels(targets)
        # A state that is several copies is one row with their number as factor: its term. Padding has factor 0.
        term_L = torch.where(target_L == self.ids.pad, 0, rows.copies_N)
        return TokenBatch(
            source=source,
            rows=rows,
            target_L=target_L,
            term_L=term_L,
            tuple_PK=torch.empty((0, 1), dtype=torch.int64),
            row_sample_L=row_sample_R[rows.out_L],
            row_position_L=row_position_R[rows.out_L],
            term_counts=tuple(torch.bincount(term_L, minlength=self.options.copies + 1).tolist()),
            **target_fields(examples, self.model.length_classes),
        )

    def counts(self, batch: TokenBatch) -> dict[str, int]:
        return {"lplm": sum(k * n for k, n in enumerate(batch.term_counts)), "length": batch.n_samples}

    def losses(self, model: EncoderDecoder, batch: TokenBatch, scale: Mapping[str, float]) -> tuple[Tensor, LossSums]:
        memory_MD = model.encode(batch.source)
        h_ND = model.decode(batch.rows, memory_MD)
        factors = range(self.options.copies + 1)
        loss = VocabTargets(
            target_R=batch.target_L,
            term_R=batch.term_L,
            tuple_PK=batch.tuple_PK,
            ce_scale=[k * scale["lplm"] for k in factors],
            label_smoothing=self.options.label_smoothing,
        )
        assert isinstance(batch.rows, ExitRows)
        total, ce_T = model.ramp_losses(h_ND, batch.rows.sizes, loss)
        length_sum = length_loss(model, batch, memory_MD)
        sums = {"lplm": (ce_T * ce_T.new_tensor(factors)).sum(), "length": length_sum.detach()}
        return total + scale["length"] * length_sum, sums

    @torch.no_grad()
    def preview(self, model: EncoderDecoder, batch: TokenBatch, limit: int) -> list[Preview]:
        """What every token is if the whole text leaves at the first layer, and at the last."""
        lengths = [n - 1 for n in batch.n_target[:limit]]
        memory_MD = model.encode(batch.source)
        ranges = [batch.source.memory_range(index) for index in range(len(lengths))]
        written: dict[str, Sequence[Tensor]] = {}
        for layer in sorted({1, self.model.decoder_layers}):
            samples = [self._sample(at, np.full((1, n), layer)) for n, at in zip(lengths, ranges, strict=True)]
            rows = pack_exits(samples, self.model.decoder_layers, len(memory_MD), detach=False).to(memory_MD.device)
            h_ND = model.decode(rows, memory_MD)
            written[f"layer_{layer}"] = likeliest(model.ramp(layer), h_ND).split(lengths)
        return mask_previews(batch, written, self.ids.bos, limit)

    def _sample(self, memory: tuple[int, int], exits: np.ndarray) -> ExitSample:
        return ExitSample.masks(exits, memory, self.ids, self.options.first_row)


def _exits(example: Example, n: int) -> np.ndarray:
    """[k, n]: the layers drawn for an example; rows behind its target leave where its first ones do."""
    if not isinstance(example, ExitExample):
        raise TypeError(f"lplm collates what it has corrupted, an ExitExample, got {type(example).__name__}")
    return example.exits[:, np.arange(n) % example.exits.shape[1]]

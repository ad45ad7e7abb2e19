"""Soft exit in fine-tuning: every layer learns to write the text, from what the layer below would have written.

Terms: exit_1 .. exit_L (cross-entropy after each layer; the loss is their mean), length.
`pretrain/models/soft_exit.py` has the forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.config import Fraction, ModelConfig, Rate, Section
from pretrain.errors import ConfigError
from pretrain.models import DecoderRows, EncoderDecoder, VocabTargets
from pretrain.models.ids import SpecialIds
from pretrain.models.patterns import ArLayout, FirstRow
from pretrain.models.soft_exit import decode_soft, likeliest
from pretrain.objectives.base import Example, LossSums, Preview, from_preset
from pretrain.objectives.batch import length_loss
from pretrain.objectives.corruption import Infilling, infill_text
from pretrain.objectives.from_masks import MaskBatch, RowsPerText, check_rows, mask_fields, mask_previews

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"first_row": "bos", "rows": "longest", "given": 0.3},
}


class SoftExitOptions(Section):
    """Options of the objective. `preset` fills in what is not given:

    * `paper` (default): MASKs alone in the decoder, every row is fed what it would write (ELMER, section 4.3).
    * `released`: BOS in the first row, MASK rows up to the longest target of the micro-batch, and the right token in
      place of the argmax for 30 % of the rows with a target at each boundary (there, of those behind it, too).

    rows: see `rows_per_text`. given: share of rows that are fed the right token in training. corruption: of texts;
    pairs stay as they are.
    """

    name: Literal["soft_exit"] = "soft_exit"
    preset: Literal["paper", "released"] = "paper"
    first_row: FirstRow = "mask"
    rows: RowsPerText = "target"
    given: Fraction = 0.0
    label_smoothing: Rate = 0.0
    length_weight: float = Field(0.0, ge=0.0)
    corruption: Infilling = Infilling()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        return from_preset(values, PRESETS)


@dataclass(frozen=True)
class GivenExample(Example):
    """given: bool [L - 1, N + 1], where a row is fed the right token."""

    given: np.ndarray


@dataclass(frozen=True)
class GivenBatch(MaskBatch):
    """given_BR: bool, the same for all rows, none for rows behind a text."""

    given_BR: Tensor

    @property
    def head_rows(self) -> int:
        return (len(self.given_BR) + 1) * len(self.real_S)

    @property
    def fed_rows(self) -> int:
        return self.given_BR.numel()


class SoftExit:
    """The objective on packed rows; row i, at position i, predicts t[i + 1] after every layer."""

    def __init__(self, options: SoftExitOptions, ids: SpecialIds, word_starts: np.ndarray | None, model: ModelConfig):
        check_rows(options.rows, model)
        if not model.soft_exit:
            raise ConfigError("`model.soft_exit` must be true for objective soft_exit, which feeds predictions back")
        self.options, self.ids, self.word_starts, self.model = options, ids, word_starts, model
        self.terms = [f"exit_{layer + 1}" for layer in range(model.decoder_layers)]
        self.weights: Mapping[str, float] = {
            **{name: 1.0 / len(self.terms) for name in self.terms},
            "length": options.length_weight,
        }
        self.layout = ArLayout.aligned("bos_first", ids)
        self.modes: Sequence[str] = ("soft_exit",)

    def corrupt(self, tokens: np.ndarray, sentences: np.ndarray, rng: np.random.Generator) -> GivenExample:
        how, vocabulary = self.options.corruption, self.model.vocab_size
        example = infill_text(tokens, sentences, how, self.ids, self.word_starts, vocabulary, rng)
        return self.corrupt_pair(example.source, example.target, rng)

    def corrupt_pair(self, source: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> GivenExample:
        given = rng.random((self.model.decoder_layers - 1, len(target) - 1)) < self.options.given
        return GivenExample(source, target, np.empty(0, np.int64), given)

    def collate(self, examples: Sequence[Example]) -> GivenBatch:
        options = self.options
        fields = mask_fields(examples, options.rows, options.first_row, self.ids, self.model.length_classes)
        given = [np.empty((self.model.decoder_layers - 1, 0), bool)]
        for example, n in zip(examples, fields["rows_B"], strict=True):
            fed = example.given[:, :n] if isinstance(example, GivenExample) else given[0]
            given.append(np.pad(fed, ((0, 0), (0, n - fed.shape[1]))))
        return GivenBatch(**fields, given_BR=torch.from_numpy(np.concatenate(given, axis=1)))

    def counts(self, batch: GivenBatch) -> dict[str, int]:
        return {**dict.fromkeys(self.terms, batch.term_counts[0]), "length": batch.n_samples}

    def losses(self, model: EncoderDecoder, batch: GivenBatch, scale: Mapping[str, float]) -> tuple[Tensor, LossSums]:
        memory_MD = model.encode(batch.source)
        assert isinstance(batch.rows, DecoderRows)
        # What is given helps to learn; a loss that is to tell how well a model writes must do without.
        given = (batch.target_L, batch.given_BR) if model.training else ()
        states = decode_soft(model, batch.rows, memory_MD, *given)
        target_S, sizes = batch.target_L[batch.real_S], [len(batch.real_S)] * len(states)
        loss = VocabTargets(
            target_R=target_S.repeat(len(states)),
            term_R=torch.arange(len(states), device=target_S.device).repeat_interleave(len(target_S)),
            tuple_PK=batch.tuple_PK,
            ce_scale=[scale[name] for name in self.terms],
            label_smoothing=self.options.label_smoothing,
        )
        scored = torch.cat([h_RD.index_select(0, batch.real_S) for h_RD in states])
        total, ce_T = model.ramp_losses(scored, sizes, loss)
        length_sum = length_loss(model, batch, memory_MD)
        sums = {**dict(zip(self.terms, ce_T, strict=True)), "length": length_sum.detach()}
        return total + scale["length"] * length_sum, sums

    @torch.no_grad()
    def preview(self, model: EncoderDecoder, batch: GivenBatch, limit: int) -> list[Preview]:
        """What the first and the last layer write when nothing is given."""
        assert isinstance(batch.rows, DecoderRows)
        states = decode_soft(model, batch.rows, model.encode(batch.source))
        written = {
            f"layer_{layer}": likeliest(model.ramp(layer), states[layer - 1]).split(batch.rows_B)
            for layer in sorted({1, len(states)})
        }
        return mask_previews(batch, written, self.ids.bos, limit)

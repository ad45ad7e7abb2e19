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
from pretrain.models import DecoderRows, EncoderDecoder, SourceRows, Stream, VocabTargets, pack_streams
from pretrain.models.ids import SpecialIds
from pretrain.models.patterns import ArLayout, FirstRow, mask_rows
from pretrain.models.soft_exit import decode_soft, likeliest
from pretrain.objectives.base import Example, LossSums, Preview
from pretrain.objectives.batch import (
    RowsPerText,
    TokenBatch,
    check_rows,
    length_loss,
    rows_per_text,
    target_fields,
)
from pretrain.objectives.corruption import Infilling, infill_text

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"first_row": "bos", "rows": "longest", "given": 0.3},
}


class SoftExitOptions(Section):
    """Options of the objective. `preset` fills in what is not given:

    * `paper` (default): MASKs alone in the decoder, every row is fed what it would write (ELMER, section 4.3).
    * `released`: BOS in the first row, MASK rows up to the longest target of the micro-batch, and the right token in
      place of the argmax for 30 % of the rows with a target at each boundary (there, of those behind it, too).

    rows: see `rows_per_text`. given: share of rows that are fed the right token. corruption: of texts; pairs stay as
    they are.
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
        return {**PRESETS.get(str(values.get("preset", "paper")), {}), **values} if isinstance(values, dict) else values


@dataclass(frozen=True)
class GivenExample(Example):
    """given: bool [L - 1, N + 1], where a row is fed the right token."""

    given: np.ndarray


@dataclass(frozen=True)
class GivenBatch(TokenBatch):
    """given_BR: bool, the same for all rows, none for rows behind a text. real_S: the rows that have a target."""

    given_BR: Tensor
    real_S: Tensor

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
        source = SourceRows.pack([example.source for example in examples])
        streams, given = [], [np.empty((self.model.decoder_layers - 1, 0), bool)]
        for index, (example, n) in enumerate(zip(examples, rows_per_text(examples, self.options.rows), strict=True)):
            real = len(example.target) - 1
            targets = np.concatenate([example.target[1:], np.full(n - real, self.ids.pad)])
            tokens = mask_rows(n, self.ids, self.options.first_row)
            memory = source.memory_range(index)
            streams.append(Stream(tokens, np.arange(n), [(n, n, 0, 0, 0, 0)], memory, (0, n), targets, term=0))
            fed = example.given if isinstance(example, GivenExample) else np.zeros((len(given[0]), real), bool)
            given.append(np.pad(fed[:, :n], ((0, 0), (0, n - fed[:, :n].shape[1]))))
        rows, target_L, _ = pack_streams(streams, source.mask.n_rows)
        lengths = [len(stream.tokens) for stream in streams]
        real_L = target_L != self.ids.pad
        return GivenBatch(
            source=source,
            rows=rows,
            target_L=target_L,
            term_L=torch.zeros_like(target_L),
            tuple_PK=torch.empty((0, 1), dtype=torch.int64),
            row_sample_L=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
            row_position_L=torch.cat([*(torch.arange(1, n + 1) for n in lengths), torch.empty(0, dtype=torch.int64)]),
            term_counts=(int(real_L.sum()),),
            given_BR=torch.from_numpy(np.concatenate(given, axis=1)),
            real_S=real_L.nonzero().squeeze(1),
            **target_fields(examples, self.model.length_classes),
        )

    def counts(self, batch: TokenBatch) -> dict[str, int]:
        return {**dict.fromkeys(self.terms, batch.term_counts[0]), "length": batch.n_samples}

    def losses(self, model: EncoderDecoder, batch: GivenBatch, scale: Mapping[str, float]) -> tuple[Tensor, LossSums]:
        memory_MD = model.encode(batch.source)
        assert isinstance(batch.rows, DecoderRows)
        states = decode_soft(model, batch.rows, memory_MD, batch.target_L, batch.given_BR)
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
    def preview(self, model: EncoderDecoder, batch: TokenBatch, limit: int) -> list[Preview]:
        """What the first and the last layer write when nothing is given."""
        assert isinstance(batch.rows, DecoderRows)
        states = decode_soft(model, batch.rows, model.encode(batch.source))
        written = {layer + 1: likeliest(model.ramp(layer + 1), states[layer]) for layer in sorted({0, len(states) - 1})}
        found = []
        for index, target in enumerate(batch.target_T.split(batch.n_target)[:limit]):
            start, length = batch.source.memory_range(index)
            mine = (batch.row_sample_L == index) & (batch.row_position_L < len(target))
            predicted = {f"layer_{n}": [self.ids.bos, *token_L[mine].tolist()] for n, token_L in written.items()}
            places = {mode: list(range(1, len(target))) for mode in predicted}
            source = batch.source.tokens_R[start : start + length].tolist()
            found.append(Preview(source, target.tolist(), predicted, places))
        return found

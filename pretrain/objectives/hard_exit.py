"""Hard exit, ELMER's tuning for writing in which each token leaves at the first layer that is sure of it.

The decoder reads MASKs alone, as in `lplm`. The paper does not say how off-ramps are trained, so there are two ways:

* `all`: every off-ramp predicts every token; nothing is copied. DeeBERT's second stage, on which the paper builds.
* `simulated`: the model decides where each token leaves, as it does when it writes (`pretrain/models/early_exit.py`);
  the state is copied upward as in `lplm`, and that off-ramp alone is trained.

Terms: hard_exit (cross-entropy over tokens, and in `all` over layers), length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pretrain.config import ModelConfig, Rate, Section
from pretrain.models import (
    DecoderRows,
    EncoderDecoder,
    ExitSample,
    VocabTargets,
    pack_exits,
)
from pretrain.models.early_exit import ExitRule, ParallelRows, plan_exits, write_early
from pretrain.models.ids import SpecialIds
from pretrain.models.patterns import ArLayout, FirstRow
from pretrain.objectives.base import Example, LossSums, Preview
from pretrain.objectives.batch import length_loss
from pretrain.objectives.corruption import Infilling, infill_text
from pretrain.objectives.from_masks import MaskBatch, RowsPerText, check_rows, mask_fields, mask_previews

Threshold = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class HardExitOptions(Section):
    """training: `all` or `simulated`, see above. threshold: nats; below it a token leaves.

    rows: see `rows_per_text`; rows behind a target have no loss, but the others read them.
    first_row, corruption: as in `lplm`. detach_copied_state: the layers above send no gradient into what has left.
    """

    name: Literal["hard_exit"] = "hard_exit"
    training: Literal["all", "simulated"] = "all"
    threshold: Threshold = 0.5
    rows: RowsPerText = "target"
    first_row: FirstRow = "mask"
    detach_copied_state: bool = True
    label_smoothing: Rate = 0.0
    length_weight: float = Field(0.0, ge=0.0)
    corruption: Infilling = Infilling()


@dataclass(frozen=True)
class RampBatch(MaskBatch):
    """ramps: layers that predict each row. deciding: whether a forward without gradient decides where rows leave."""

    ramps: int
    deciding: bool

    @property
    def head_rows(self) -> int:
        return self.ramps * len(self.real_S)

    @property
    def deciding_rows(self) -> int:
        return len(self.target_L) if self.deciding else 0


class HardExit:
    """The objective on packed rows; row i, at position i, predicts t[i + 1].

    Raises:
        ConfigError: more `rows` than the model has positions.
    """

    def __init__(
        self, options: HardExitOptions, ids: SpecialIds, word_starts: np.ndarray | None, model: ModelConfig
    ) -> None:
        check_rows(options.rows, model)
        self.options, self.ids, self.word_starts, self.model = options, ids, word_starts, model
        self.weights: Mapping[str, float] = {"hard_exit": 1.0, "length": options.length_weight}
        self.layout = ArLayout.aligned("bos_first", ids)
        self.modes: Sequence[str] = ("hard_exit",)
        self.rule = ExitRule(options.threshold)
        self.ramps = model.decoder_layers if options.training == "all" else 1

    def corrupt(self, tokens: np.ndarray, sentences: np.ndarray, rng: np.random.Generator) -> Example:
        how, vocabulary = self.options.corruption, self.model.vocab_size
        return infill_text(tokens, sentences, how, self.ids, self.word_starts, vocabulary, rng)

    def corrupt_pair(self, source: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Example:
        return Example(source, target, np.empty(0, np.int64))

    def collate(self, examples: Sequence[Example]) -> RampBatch:
        options = self.options
        fields = mask_fields(examples, options.rows, options.first_row, self.ids, self.model.length_classes)
        return RampBatch(**fields, ramps=self.ramps, deciding=options.training == "simulated")

    def counts(self, batch: RampBatch) -> dict[str, int]:
        return {"hard_exit": self.ramps * batch.term_counts[0], "length": batch.n_samples}

    def losses(self, model: EncoderDecoder, batch: RampBatch, scale: Mapping[str, float]) -> tuple[Tensor, LossSums]:
        memory_MD = model.encode(batch.source)
        if self.options.training == "all":
            assert isinstance(batch.rows, DecoderRows)
            sizes: Sequence[int] = [len(batch.real_S)] * self.ramps
            parts = model.decode_every_layer(batch.rows, memory_MD).split(len(batch.target_L) or 1)
            h_LD = torch.cat([part.index_select(0, batch.real_S) for part in parts])
            row_L = batch.real_S.repeat(self.ramps)
        else:
            h_LD, row_L, sizes = self._simulated(model, batch, memory_MD)
        loss = VocabTargets(
            target_R=batch.target_L[row_L],
            term_R=torch.zeros_like(row_L),
            tuple_PK=batch.tuple_PK,
            ce_scale=[scale["hard_exit"]],
            label_smoothing=self.options.label_smoothing,
        )
        total, ce_T = model.ramp_losses(h_LD, sizes, loss)
        length_sum = length_loss(model, batch, memory_MD)
        return total + scale["length"] * length_sum, {"hard_exit": ce_T[0], "length": length_sum.detach()}

    def _simulated(
        self, model: EncoderDecoder, batch: RampBatch, memory_MD: Tensor
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """States of the rows with a target where the model lets them leave, which rows, and how many at each layer."""
        lengths = batch.rows_B
        rows = ParallelRows.pack(model, lengths, batch.source, self.options.first_row)
        exits = np.split(plan_exits(model, rows, memory_MD.detach(), self.rule)[None], np.cumsum(lengths)[:-1], axis=1)
        samples = [
            ExitSample.masks(x, batch.source.memory_range(i), self.ids, self.options.first_row)
            for i, x in enumerate(exits[: len(lengths)])
        ]
        plan = pack_exits(samples, self.model.decoder_layers, len(memory_MD), self.options.detach_copied_state)
        real_R = np.zeros(sum(lengths), bool)
        real_R[batch.real_S.cpu().numpy()] = True
        kept = np.flatnonzero(real_R[plan.out_L.numpy()])
        sizes = np.bincount(plan.layer_N.numpy()[kept], minlength=len(plan.sizes) + 1)[1:]
        kept_S, plan = torch.from_numpy(kept).to(memory_MD.device), plan.to(memory_MD.device)
        h_SD = model.decode(plan, memory_MD).index_select(0, kept_S)
        return h_SD, plan.out_L[kept_S], tuple(sizes.tolist())

    @torch.no_grad()
    def preview(self, model: EncoderDecoder, batch: RampBatch, limit: int) -> list[Preview]:
        """What every row writes where it leaves, and at the last layer."""
        memory_MD = model.encode(batch.source)
        rows = ParallelRows.pack(model, batch.rows_B, batch.source, self.options.first_row)
        written = {
            mode: write_early(model, rows, memory_MD, rule, ()).token_R.split(batch.rows_B)
            for mode, rule in (("hard_exit", self.rule), ("last_layer", ExitRule(0.0)))
        }
        return mask_previews(batch, written, self.ids.bos, limit)

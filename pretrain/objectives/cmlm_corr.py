"""CMLM that also learns to correct what it has written, without added parameters (CMLM+Corr; JANUS, Table 1).

Besides the masked pass of CMLM: of the tokens that the masked text still shows, some are replaced by what the model
itself writes there when everything is hidden, and a second pass has to name the right ones (Huang et al. 2022, CMLMC,
section 3.2, without its reveal-position architecture). The forward that writes the replacements has no gradient.

Terms: nar (the hidden tokens), corr (the replaced ones), length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.config import Fraction, ModelConfig
from pretrain.models.encoder_decoder import EncoderDecoder
from pretrain.models.ids import SpecialIds
from pretrain.models.patterns import nar
from pretrain.models.rows import DecoderRows, SourceRows, Stream, pack_streams
from pretrain.models.soft_exit import likeliest
from pretrain.objectives.base import Example, LossSums, Preview
from pretrain.objectives.batch import SampleStreams, TokenBatch, decoded_losses, pack_batch, previews
from pretrain.objectives.cmlm import Cmlm, MaskedOptions

CE_TERMS = ("nar", "corr")


class CmlmCorrOptions(MaskedOptions):
    """replaced: share of the visible tokens, rounded down. corr_weight: of the correction; the rest is of `nar`.

    The defaults are those of the released CMLMC: 30 %, and the mean of both losses.
    """

    name: Literal["cmlm_corr"] = "cmlm_corr"
    replaced: Fraction = 0.3
    corr_weight: Fraction = 0.5


@dataclass(frozen=True)
class ReplacedExample(Example):
    """replaced: int64 [c], increasing indices into `target` of visible tokens; never BOS or EOS."""

    replaced: np.ndarray


@dataclass(frozen=True)
class CorrBatch(TokenBatch):
    """guess: the texts with everything hidden; its used rows write, in order, what the rows of `corr` read."""

    guess: DecoderRows

    @property
    def guessing(self) -> DecoderRows:
        return self.guess

    def to(self, device: torch.device) -> "CorrBatch":
        moved = super().to(device)
        assert isinstance(moved, CorrBatch)
        return replace(moved, guess=self.guess.to(device))


class CmlmCorr(Cmlm):
    """The objective on packed rows. It hides the tokens that CMLM hides with the same draws."""

    def __init__(self, options: CmlmCorrOptions, ids: SpecialIds, word_starts: np.ndarray | None, model: ModelConfig):
        super().__init__(options, ids, word_starts, model)
        self.share = options.replaced
        corr = options.corr_weight
        self.weights = {"nar": 1.0 - corr, "corr": corr, "length": options.length_weight}

    def corrupt_pair(self, source: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> ReplacedExample:
        masked = super().corrupt_pair(source, target, rng).masked
        shown = np.setdiff1d(np.arange(1, len(target) - 1), masked)
        replaced = np.sort(rng.permutation(shown)[: int(self.share * len(shown))])
        return ReplacedExample(source, target, masked, replaced)

    def collate(self, examples: Sequence[Example]) -> CorrBatch:
        source = SourceRows.pack([example.source for example in examples])
        samples, guesses = [], []
        for index, example in enumerate(examples):
            target, masked, memory = example.target, example.masked, source.memory_range(index)
            streams, positions = [], []
            if len(masked):
                streams.append(nar(target, masked, memory, self.ids.mask, term=0))
                positions.append(masked)
            replaced = example.replaced if isinstance(example, ReplacedExample) else masked[:0]
            if len(replaced):
                everything = np.arange(1, len(target) - 1)
                others = np.setdiff1d(everything, replaced)
                guesses.append(self._rewriting(target, others, replaced, memory))
                streams.append(self._rewriting(target, masked, replaced, memory))
                positions.append(replaced)
            samples.append(SampleStreams(streams, positions, []))
        packed = pack_batch(examples, samples, source, len(CE_TERMS), 1, self.model.length_classes)
        guess, _, _ = pack_streams(guesses, source.mask.n_rows)
        return CorrBatch(**vars(packed), guess=guess)

    def counts(self, batch: TokenBatch) -> dict[str, int]:
        return {**dict(zip(CE_TERMS, batch.term_counts, strict=True)), "length": batch.n_samples}

    def losses(self, model: EncoderDecoder, batch: TokenBatch, scale: Mapping[str, float]) -> tuple[Tensor, LossSums]:
        memory_MD = model.encode(batch.source)
        batch = self._with_guesses(model, batch, memory_MD.detach())
        return decoded_losses(model, batch, memory_MD, scale, CE_TERMS, {}, self.options.label_smoothing)

    def preview(self, model: EncoderDecoder, batch: TokenBatch, limit: int) -> list[Preview]:
        with torch.no_grad():
            batch = self._with_guesses(model, batch, model.encode(batch.source))
        return previews(model, batch, CE_TERMS, limit)

    def _rewriting(
        self, target: np.ndarray, hidden: np.ndarray, replaced: np.ndarray, memory: tuple[int, int]
    ) -> Stream:
        """Rows [visible | MASK | replaced] that all read each other; the replaced ones predict. They begin as MASKs."""
        keep = np.ones(len(target), dtype=bool)
        keep[hidden] = keep[replaced] = False
        visible = np.flatnonzero(keep)
        n, masks = len(target), len(hidden) + len(replaced)
        tokens = np.concatenate([target[visible], np.full(masks, self.ids.mask)])
        positions = np.concatenate([visible, hidden, replaced])
        segments = [(n, n, 0, 0, 0, 0)]
        return Stream(tokens, positions, segments, memory, (n - len(replaced), n), target[replaced], term=1)

    def _with_guesses(self, model: EncoderDecoder, batch: TokenBatch, memory_MD: Tensor) -> CorrBatch:
        """`batch` with the model's own tokens in the rows to correct; every rank runs the decoder for it."""
        assert isinstance(batch, CorrBatch)
        with torch.no_grad():
            guess_C = likeliest(model.head, model.decode(batch.guess, memory_MD))
        rows = batch.rows
        assert isinstance(rows, DecoderRows)
        tokens_R = rows.tokens_R.index_copy(0, rows.out_L[batch.term_L == 1], guess_C)
        return replace(batch, rows=replace(rows, tokens_R=tokens_R))

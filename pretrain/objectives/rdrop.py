"""NAR and AUX on two dropout copies of every sample, tied by R-Drop: how the JANUS repository tunes.

Each sample is encoded and decoded twice with dropout of its own, and each pattern is asked to predict the same with
both (the repository's `janus_trans_loss.py`; Liang et al. 2021). Tokens are hidden uniformly, as in CMLM.

Terms: nar, aux (cross-entropy over both copies), kl_nar, kl_aux (half the sum of both directions between the copies of
a pattern), length (over both copies).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.models.encoder_decoder import EncoderDecoder
from pretrain.models.ids import SpecialIds
from pretrain.models.patterns import nar_aux
from pretrain.models.rows import SourceRows
from pretrain.objectives.base import Example, LossSums, Preview
from pretrain.objectives.batch import SampleStreams, TokenBatch, pack_batch, packed_losses, previews
from pretrain.objectives.cmlm import Cmlm, MaskedOptions

COPIES = 2
CE_TERMS = ("nar", "aux")
# Columns of a tuple: NAR and AUX of the first copy, NAR and AUX of the second.
KL_TERMS = {"kl_nar": (0, 2), "kl_aux": (1, 3)}


class RDropOptions(MaskedOptions):
    """kl_weight: of each pattern's KL between its copies."""

    name: Literal["rdrop"] = "rdrop"
    kl_weight: float = Field(1.0, ge=0.0)


@dataclass(frozen=True)
class CopiesBatch(TokenBatch):
    """length_B: of both copies, one behind the other; source holds both as well."""

    @property
    def copies(self) -> int:
        return COPIES


class RDrop(Cmlm):
    """The objective on packed rows. It corrupts as CMLM does."""

    def __init__(self, options: RDropOptions, ids: SpecialIds, word_starts: np.ndarray | None, model: ModelConfig):
        super().__init__(options, ids, word_starts, model)
        kl = dict.fromkeys(KL_TERMS, options.kl_weight)
        self.weights = {**dict.fromkeys(CE_TERMS, 1.0), **kl, "length": options.length_weight}

    def collate(self, examples: Sequence[Example]) -> CopiesBatch:
        source = SourceRows.pack([example.source for example in examples] * COPIES)
        samples = [self._streams(source, examples, index) for index in range(len(examples))]
        packed = pack_batch(examples, samples, source, len(CE_TERMS), COPIES * len(CE_TERMS), self.model.length_classes)
        return CopiesBatch(**{**vars(packed), "length_B": packed.length_B.repeat(COPIES)})

    def counts(self, batch: TokenBatch) -> dict[str, int]:
        ce = dict(zip(CE_TERMS, batch.term_counts, strict=True))
        return {**ce, **dict.fromkeys(KL_TERMS, len(batch.tuple_PK)), "length": len(batch.length_B)}

    def losses(self, model: EncoderDecoder, batch: TokenBatch, scale: Mapping[str, float]) -> tuple[Tensor, LossSums]:
        return packed_losses(model, batch, scale, CE_TERMS, KL_TERMS, self.options.label_smoothing)

    def preview(self, model: EncoderDecoder, batch: TokenBatch, limit: int) -> list[Preview]:
        return previews(model, batch, CE_TERMS, limit)

    def _streams(self, source: SourceRows, examples: Sequence[Example], index: int) -> SampleStreams:
        """Both patterns of both copies of a sample."""
        example = examples[index]
        if not len(example.masked):
            return SampleStreams([], [], [])
        streams = [
            stream
            for copy in range(COPIES)
            for stream in nar_aux(
                example.target,
                example.masked,
                source.memory_range(copy * len(examples) + index),
                self.ids.mask,
                nar_term=0,
                aux_term=1,
            )
        ]
        ranks = np.arange(len(example.masked))
        return SampleStreams(streams, [example.masked] * len(streams), [(stream, ranks) for stream in streams])

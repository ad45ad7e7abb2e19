"""The packed micro-batch that the token objectives share, its loss and its preview.

Shapes: R rows, L rows with a loss, P tuples, K streams, B samples, T target tokens of all samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models import DecoderRows, EncoderDecoder, ExitRows, SourceRows, Stream, VocabTargets, pack_streams
from pretrain.models.rows import to_device
from pretrain.objectives.base import Example, LossSums, Preview


@dataclass(frozen=True)
class TokenBatch:
    """One forward's worth of rows.

    target_L, term_L: right token and cross-entropy term of each used row. tuple_PK: rows of the K streams that
    predict the same masked token. length_B: length class of each sample. target_T: all targets, `n_target` a sample.
    row_position_L: index into the sample's target; row_sample_L: the sample, both for previews.
    term_counts: used rows of each term.
    """

    source: SourceRows
    rows: DecoderRows | ExitRows
    target_L: Tensor
    term_L: Tensor
    tuple_PK: Tensor
    length_B: Tensor
    target_T: Tensor
    n_target: tuple[int, ...]
    row_sample_L: Tensor
    row_position_L: Tensor
    term_counts: tuple[int, ...]

    @property
    def n_samples(self) -> int:
        return len(self.n_target)

    @property
    def n_tokens(self) -> int:
        return sum(self.n_target)

    @property
    def head_rows(self) -> int:
        """Rows that are projected onto the vocabulary."""
        return len(self.target_L)

    @property
    def deciding_rows(self) -> int:
        """Rows that a forward without gradient takes through every layer, and head but the last, beforehand."""
        return 0

    @property
    def guessing(self) -> DecoderRows | None:
        """Input of a forward without gradient beforehand, whose rows in use are projected onto the vocabulary."""
        return None

    @property
    def fed_rows(self) -> int:
        """Rows whose state is mixed with what they would write."""
        return 0

    @property
    def copies(self) -> int:
        """How often every target stands in the rows."""
        return 1

    def source_tokens(self, index: int) -> list[int]:
        """What the encoder reads of a sample."""
        start, length = self.source.memory_range(index)
        return self.source.tokens_R[start : start + length].tolist()

    def to(self, device: torch.device) -> "TokenBatch":
        moved: dict[str, Any] = {
            name: v.to(device, non_blocking=True) for name, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, source=to_device(self.source, device), rows=self.rows.to(device), **moved)


@dataclass(frozen=True)
class SampleStreams:
    """The streams of one sample. aligned: for each stream, the used-row indices that predict the masked tokens."""

    streams: list[Stream]
    positions: list[np.ndarray]
    aligned: list[tuple[Stream, np.ndarray]]


def pack_batch(
    examples: Sequence[Example],
    samples: Sequence[SampleStreams],
    source: SourceRows,
    terms: int,
    tuple_width: int,
    length_classes: int,
) -> TokenBatch:
    """Packs the streams of every sample; `source` holds the encoder rows their memory ranges point into."""
    streams = [stream for sample in samples for stream in sample.streams]
    rows, target_L, term_L = pack_streams(streams, source.mask.n_rows)
    used = len(target_L)
    row_sample, row_position = np.zeros(used, np.int64), np.zeros(used, np.int64)
    tuples = [np.empty((0, tuple_width), np.int64)]
    for index, sample in enumerate(samples):
        for stream, positions in zip(sample.streams, sample.positions, strict=True):
            where = slice(stream.out_start, stream.out_start + len(stream.targets))
            row_sample[where], row_position[where] = index, positions
        if len(sample.aligned) > 1:
            tuples.append(np.stack([stream.out_start + at for stream, at in sample.aligned], axis=1))
    return TokenBatch(
        source=source,
        rows=rows,
        target_L=target_L,
        term_L=term_L,
        tuple_PK=torch.from_numpy(np.concatenate(tuples)),
        row_sample_L=torch.from_numpy(row_sample),
        row_position_L=torch.from_numpy(row_position),
        term_counts=tuple(torch.bincount(term_L, minlength=terms).tolist()),
        **target_fields(examples, length_classes),
    )


def target_fields(examples: Sequence[Example], length_classes: int) -> dict[str, Any]:
    """The fields of a `TokenBatch` that follow from the targets alone."""
    n_target = tuple(len(example.target) for example in examples)
    return {
        "length_B": torch.tensor(n_target, dtype=torch.int64).clamp(max=length_classes - 1),
        "target_T": torch.from_numpy(np.concatenate([*(e.target for e in examples), np.empty(0, np.int64)])),
        "n_target": n_target,
    }


def packed_losses(
    model: EncoderDecoder,
    batch: TokenBatch,
    scale: Mapping[str, float],
    ce_terms: Sequence[str],
    kl_terms: Mapping[str, tuple[int, int]],
    label_smoothing: float,
) -> tuple[Tensor, LossSums]:
    """Encoder, decoder, fused vocabulary loss and length loss of a packed batch.

    ce_terms: names of the cross-entropy terms in the order of `term_L`; kl_terms: name -> columns of `tuple_PK`.
    A `length` entry in `scale` other than 0 trains the length head; it runs in any case, so that every rank
    calls the same modules.
    """
    return decoded_losses(model, batch, model.encode(batch.source), scale, ce_terms, kl_terms, label_smoothing)


def decoded_losses(
    model: EncoderDecoder,
    batch: TokenBatch,
    memory_MD: Tensor,
    scale: Mapping[str, float],
    ce_terms: Sequence[str],
    kl_terms: Mapping[str, tuple[int, int]],
    label_smoothing: float,
) -> tuple[Tensor, LossSums]:
    """`packed_losses` over an encoder output that is there already."""
    h_LD = model.decode(batch.rows, memory_MD)
    loss = VocabTargets(
        target_R=batch.target_L,
        term_R=batch.term_L,
        tuple_PK=batch.tuple_PK,
        ce_scale=[scale[name] for name in ce_terms],
        kl_pairs=list(kl_terms.values()),
        kl_scale=[scale[name] for name in kl_terms],
        label_smoothing=label_smoothing,
    )
    total, ce_T, kl_Q = model.head(h_LD, loss)
    sums: LossSums = dict(zip((*ce_terms, *kl_terms), (*ce_T, *kl_Q), strict=True))
    length_sum = length_loss(model, batch, memory_MD)
    sums["length"] = length_sum.detach()
    return total + scale["length"] * length_sum.to(total.dtype), sums


def length_loss(model: EncoderDecoder, batch: TokenBatch, memory_MD: Tensor) -> Tensor:
    """Summed cross-entropy of the length predictor, in float32 or wider."""
    # With the encoder run twice, the second half of the source rows belongs to the NAR and AUX pass.
    length_BN = model.length_logits(memory_MD, batch.source)[-len(batch.length_B) or len(memory_MD) :]
    wide = length_BN.float() if length_BN.dtype.itemsize < 4 else length_BN
    return F.cross_entropy(wide, batch.length_B, reduction="sum")


@torch.no_grad()
def previews(model: EncoderDecoder, batch: TokenBatch, modes: Sequence[str], limit: int) -> list[Preview]:
    """What each term's rows predict in one step: argmax tokens put in place of the targets they stand for.

    modes: name of each cross-entropy term. Rows of `ar` see the true past, rows of `nar` the visible tokens.
    """
    h_LD = model.decode(batch.rows, model.encode(batch.source))
    predicted_L = torch.cat([model.logits(part).argmax(dim=1) for part in h_LD.split(256)])
    starts = np.cumsum(batch.n_target) - batch.n_target
    found = []
    for sample in range(min(limit, batch.n_samples)):
        target = batch.target_T[starts[sample] : starts[sample] + batch.n_target[sample]]
        filled, places = {}, {}
        for term, mode in enumerate(modes):
            mine = (batch.row_sample_L == sample) & (batch.term_L == term)
            if bool(mine.any()):
                at = batch.row_position_L[mine]
                filled[mode], places[mode] = target.clone().index_put_((at,), predicted_L[mine]).tolist(), at.tolist()
        found.append(Preview(batch.source_tokens(sample), target.tolist(), filled, places))
    return found

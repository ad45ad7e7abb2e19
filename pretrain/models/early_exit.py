"""Hard exits: each token leaves the decoder at the first layer whose off-ramp is sure of it (ELMER, section 4.3).

The off-ramp is the vocabulary head, of all layers or of this one. It is sure where H < threshold, with the entropy
H = -sum_v p_v ln p_v in nats (DeeBERT; Eq. 10 of ELMER has other indices). What has left is copied upward and computed
no more; keys and values of all rows of a text are made anew in each layer as long as one of its rows is left. After the
last layer everything leaves. The decoder runs once, so a layer projects the memory when its turn comes, and one that
nobody reaches costs nothing.

Shapes: B samples, R rows, A rows that have not left, L rows of an off-ramp, K keys, M memory rows, D width,
V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from parlance_kernels import SampleMask, offramp_stats
from pretrain.config import ModelConfig
from pretrain.models.encoder_decoder import EncoderDecoder, VocabHead, writing
from pretrain.models.layers import DecoderLayer
from pretrain.models.patterns import FirstRow, mask_rows
from pretrain.models.rows import LayerWork, SourceRows


@dataclass(frozen=True)
class ExitRule:
    """Who leaves early. threshold: in nats; a token leaves where its entropy is below.

    layers: from 1, the only ones whose off-ramps are asked; None: all. The last layer is never asked.
    """

    threshold: float
    layers: tuple[int, ...] | None = None

    def asks(self, layer: int) -> bool:
        """Whether anything can leave after this layer; no entropy is below 0."""
        return self.threshold > 0 and (self.layers is None or layer in self.layers)

    def certain(self, config: ModelConfig) -> bool:
        """Whether all leave where they are asked: no entropy over V tokens exceeds ln V."""
        return self.threshold > math.log(config.vocab_size or 1)


@dataclass(frozen=True)
class ParallelRows:
    """MASK rows of several texts; those of a text all read each other, and its source.

    tokens_R, positions_R: int64. lengths_B: rows of each text. memory_B2: (first, number) of its encoder rows.
    """

    tokens_R: Tensor
    positions_R: Tensor
    lengths_B: np.ndarray
    memory_B2: np.ndarray

    @classmethod
    def pack(cls, model: EncoderDecoder, lengths: Sequence[int], source: SourceRows, first: FirstRow) -> "ParallelRows":
        """Rows on the device of the source, as `mask_rows` makes them."""
        device = source.tokens_R.device
        nothing = np.empty(0, np.int64)
        tokens = np.concatenate([nothing, *(mask_rows(n, model.ids, first) for n in lengths)])
        positions = np.concatenate([nothing, *(np.arange(n) for n in lengths)])
        memory = [source.memory_range(index) for index in range(len(lengths))]
        return cls(
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(positions).to(device),
            np.array(lengths, dtype=np.int64),
            np.array(memory, dtype=np.int64).reshape(-1, 2),
        )


class Ramp(NamedTuple):
    """Of each row: its entropy, its likeliest token that may be written, and the logarithm of that one's probability.

    In float32 or wider; probabilities are over the whole vocabulary, so what may be written changes no number.
    """

    entropy_L: Tensor
    token_L: Tensor
    log_p_L: Tensor


@dataclass(frozen=True)
class Left:
    """Where and as what each row left. exit_R: int64 on the host, from 1. state_RD: what other rows read of it since.

    token_R, log_p_R: as in `Ramp`, of the layer where the row left. work: of each layer that ran. scored: rows of all
    off-ramps together.
    """

    exit_R: np.ndarray
    state_RD: Tensor
    token_R: Tensor
    log_p_R: Tensor
    work: list[LayerWork]
    scored: int


def write_early(
    model: EncoderDecoder, rows: ParallelRows, memory_MD: Tensor, rule: ExitRule, banned: Sequence[int]
) -> Left:
    """Writes every row at its own layer. banned: tokens that are never written."""
    return _leave(model, rows, memory_MD, rule, banned, training=False)


def whole_layer(rows: ParallelRows) -> LayerWork:
    """The work of a layer that computes all rows."""
    return _LayerPlan.of(rows, np.arange(len(rows.tokens_R))).work


def plan_exits(model: EncoderDecoder, rows: ParallelRows, memory_MD: Tensor, rule: ExitRule) -> np.ndarray:
    """The layers, from 1, at which `write_early` would let each row leave: int64 [R] on the host.

    Every layer and every off-ramp that may be asked runs, also when all have left: the ranks of ZeRO-3 call the same
    modules in the same order. The decoder has no dropout meanwhile; a memory that was made in training has its own.
    """
    return _leave(model, rows, memory_MD, rule, (), training=True).exit_R


@torch.no_grad()
def off_ramp(head: VocabHead, h_LD: Tensor, banned: Sequence[int] = ()) -> Ramp:
    """What a layer's head says about rows that have passed the decoder's last norm; logits exist in blocks alone."""
    statistics = partial(offramp_stats, banned=banned, overwrite=True, backend=head.backend, part=head.part)
    return Ramp(*head(h_LD, reduction=statistics)[:3])


def _leave(
    model: EncoderDecoder, rows: ParallelRows, memory_MD: Tensor, rule: ExitRule, banned: Sequence[int], training: bool
) -> Left:
    layers = cast(Sequence[DecoderLayer], model.decoder.layers)
    certain = rule.certain(model.config)
    with writing(model):
        x_RD = model.decoder.embed(model.shared(rows.tokens_R) * model.scale, rows.positions_R)
        n, device = len(x_RD), x_RD.device
        token_R = torch.zeros(n, dtype=torch.int64, device=device)
        log_p_R = torch.zeros(n, dtype=torch.promote_types(x_RD.dtype, torch.float32), device=device)
        exit_R, active_A = np.full(n, len(layers)), np.arange(n)
        work, scored = [], 0
        for number, layer in enumerate(layers, start=1):
            if not len(active_A) and not training:
                break
            plan = _LayerPlan.of(rows, active_A)
            at_A = plan.active_A.to(device)
            out_AD = plan.run(layer, x_RD, memory_MD)
            x_RD.index_copy_(0, at_A, out_AD)
            work.append(plan.work)
            last = number == len(layers)
            if (last and training) or not (last or rule.asks(number)):
                continue
            ramp = off_ramp(model.ramp(number), model.decoder.layer_norm(out_AD), banned)
            scored += len(active_A)
            leave_A = torch.ones_like(at_A, dtype=torch.bool) if last or certain else ramp.entropy_L < rule.threshold
            gone = at_A[leave_A]
            token_R[gone], log_p_R[gone] = ramp.token_L[leave_A], ramp.log_p_L[leave_A]
            left = leave_A.cpu().numpy()
            exit_R[active_A[left]] = number
            active_A = active_A[~left]
        return Left(exit_R, x_RD, token_R, log_p_R, work, scored)


class _LayerPlan(NamedTuple):
    """One layer for some rows, and for the keys and the memory of the texts that they are of; tensors on the host."""

    active_A: Tensor
    key_K: Tensor
    memory_M: Tensor
    work: LayerWork

    @classmethod
    def of(cls, rows: ParallelRows, active_A: np.ndarray) -> "_LayerPlan":
        sample_A = np.repeat(np.arange(len(rows.lengths_B)), rows.lengths_B)[active_A]
        count_B = np.bincount(sample_A, minlength=len(rows.lengths_B))
        alive = np.flatnonzero(count_B)
        starts_B = np.cumsum(rows.lengths_B) - rows.lengths_B
        counts = count_B[alive]
        key_K, self_mask = _blocks(counts, starts_B[alive], rows.lengths_B[alive])
        memory_M, cross_mask = _blocks(counts, *rows.memory_B2[alive].T)
        work = LayerWork(len(active_A), len(key_K), self_mask, cross_mask)
        return cls(torch.from_numpy(active_A), torch.from_numpy(key_K), torch.from_numpy(memory_M), work)

    def run(self, layer: DecoderLayer, x_RD: Tensor, memory_MD: Tensor) -> Tensor:
        """The layer's output [A, D] from the states of all rows."""
        at_A = self.active_A.to(x_RD.device)
        y_RD = layer.self_attn_layer_norm(x_RD) if layer.pre_norm else x_RD
        keys = layer.self_attn.keys_values(y_RD[self.key_K.to(x_RD.device)])
        memory = layer.encoder_attn.keys_values(memory_MD[self.memory_M.to(x_RD.device)])
        return layer.rows(x_RD[at_A], y_RD[at_A], keys, memory, self.work.self_mask, self.work.cross_mask)


def _blocks(counts: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, SampleMask]:
    """Keys of each block, one behind the other, and the mask of `counts` rows that read the whole of theirs."""
    ends, rows = np.cumsum(lengths), np.cumsum(counts)
    first, zero = ends - lengths, np.zeros_like(counts)
    key_K = np.arange(int(lengths.sum())) + np.repeat(starts - first, lengths)
    table = np.stack([rows - counts, counts, first, lengths, zero, zero, zero, zero], axis=1)
    return key_K, SampleMask.build(table.tolist(), len(key_K))

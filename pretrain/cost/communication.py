"""Bytes that ranks hand each other in one update, from the shapes alone.

Payload is what a collective is about: the whole tensor that is reduced or gathered. A ring of n ranks sends
(n - 1) / n of it from each rank to scatter a sum or to gather, and twice that to do both.

Among data-parallel ranks, with the numbers of one rank's part of the model (N):
    ZeRO-0     the gradients are summed once
    ZeRO-1     the same, scattered, and the updated weights are gathered
    ZeRO-2     gradients are scattered after every micro-batch
    ZeRO-3     besides, weights are gathered for every forward and backward of a micro-batch, not after the update
Among ranks that share a model, rows of D numbers are summed: of every output of attention and feed-forward and of the
embeddings in the forward; in the backward the gradient of every input of q, k, v and fc1, and of the rows that are
projected onto the vocabulary. What the vocabulary loss reduces for each row is a few numbers, and left out.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from pretrain.config import EngineConfig, ModelConfig
from pretrain.cost.memory import FULL, part_sizes
from pretrain.objectives.batch import TokenBatch

ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER = "all-reduce", "reduce-scatter", "all-gather"
RINGS = {ALL_REDUCE: 2, REDUCE_SCATTER: 1, ALL_GATHER: 1}


def data_parallel_payload(model: nn.Module, engine: EngineConfig, ranks: int, micros: int) -> dict[str, int]:
    """{collective: bytes} of one update among `ranks` data-parallel ranks; `model` may be on `meta`."""
    if ranks < 2:
        return {}
    count = sum(part_sizes(model, engine.tensor_parallel))
    low = FULL if engine.precision == "fp32" else 2
    gradients, weights = FULL * count, low * count
    stage = 0 if engine.kind == "local" else engine.zero_stage
    if stage == 0:
        return {ALL_REDUCE: gradients}
    if stage == 3:
        return {REDUCE_SCATTER: micros * gradients, ALL_GATHER: 2 * micros * weights}
    return {REDUCE_SCATTER: gradients * (micros if stage == 2 else 1), ALL_GATHER: weights}


def tensor_parallel_payload(config: ModelConfig, batches: Sequence[TokenBatch], engine: EngineConfig) -> dict[str, int]:
    """{collective: bytes} of one update among the ranks that share a model, from one rank's micro-batches."""
    if engine.tensor_parallel < 2:
        return {}
    low = FULL if engine.precision == "fp32" else 2
    forward = backward = 0
    for batch in batches:
        n_source, n_rows = batch.source.mask.n_rows, len(batch.rows.tokens_R)
        layers = config.encoder_layers * n_source * 2
        backward += config.encoder_layers * n_source * 4
        for work in batch.rows.work(config.decoder_layers):
            layers += 3 * work.rows
            # q of both attentions and fc1; k and v of the rows that are keys, and of the encoder's output
            backward += 3 * work.rows + 2 * work.keys + 2 * n_source
        forward += n_source + n_rows + layers * (2 if engine.activation_checkpointing else 1)
        backward += batch.head_rows
    return {ALL_REDUCE: low * config.d_model * (forward + backward)}


def sent(payload: Mapping[str, int], ranks: int) -> float:
    """Bytes that each of `ranks` ranks sends in ring collectives."""
    return sum(RINGS[kind] * count for kind, count in payload.items()) * (ranks - 1) / ranks

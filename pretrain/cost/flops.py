"""What a step costs: parameters by part, and the floating-point operations of a packed batch.

Only products of matrices are counted, two operations for each multiply-add, over the rows and the (row, key) pairs that
really exist: no padding, nothing twice. The backward pass costs twice the forward; what activation checkpointing or an
attention kernel computes again is not model work and is left out (PaLM, appendix B).

Shapes: R rows, K keys, M memory rows, L rows with a use, D width, F feed-forward width, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder
from pretrain.models.rows import LayerWork
from pretrain.objectives.batch import TokenBatch

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Flops:
    """Operations of one forward. encoder, decoder: their linear layers; attention: of both; heads: both projections."""

    encoder: int = 0
    decoder: int = 0
    attention: int = 0
    heads: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def forward(self) -> int:
        return self.encoder + self.decoder + self.attention + self.heads

    @property
    def training(self) -> int:
        """Forward and backward."""
        return FORWARD_AND_BACKWARD * self.forward


def batch_flops(config: ModelConfig, batch: TokenBatch) -> Flops:
    """Operations of the forward over one packed micro-batch; additive over the samples."""
    source, rows = batch.source, batch.rows
    width = config.d_model
    encoder = Flops(
        encoder=config.encoder_layers * source.mask.n_rows * (8 * width * width + 4 * width * config.ffn_dim),
        attention=4 * width * config.encoder_layers * source.mask.visible_pairs(),
        heads=2 * width * source.n_samples * config.length_classes,
    )
    fed = Flops(decoder=batch.fed_rows * 4 * width * width)
    return encoder + fed + decoder_flops(config, rows.work(config.decoder_layers), batch.head_rows)


def decoder_flops(config: ModelConfig, layers: Sequence[LayerWork], scored: int) -> Flops:
    """Operations of the decoder. scored: rows that are projected onto the vocabulary, at every off-ramp anew."""
    width = config.d_model
    projection, feed_forward = 2 * width * width, 4 * width * config.ffn_dim
    # A row has queries and outputs of two attentions; keys and values belong to keys and memory rows.
    decoder = sum(
        w.rows * (4 * projection + feed_forward) + 2 * projection * (w.keys + w.cross_mask.n_keys) for w in layers
    )
    pairs = sum(w.self_mask.visible_pairs() + w.cross_mask.visible_pairs() for w in layers)
    return Flops(decoder=decoder, attention=4 * width * pairs, heads=2 * width * scored * (config.vocab_size or 0))


def deciding_flops(config: ModelConfig, batch: TokenBatch) -> int:
    """Operations of the forward that decides where rows leave, or what they are given to correct.

    What leaves is not known here, so none is saved.
    """
    if batch.guessing is not None:
        work = batch.guessing.work(config.decoder_layers)
        return decoder_flops(config, work, len(batch.guessing.out_L)).forward
    asked = batch.deciding_rows * (config.decoder_layers - 1)
    if not asked:
        return 0
    return decoder_flops(config, batch.rows.work(config.decoder_layers), asked).forward


def facts(model: EncoderDecoder) -> dict[str, Callable[[TokenBatch], int]]:
    """What the loop adds up: `flops` of forward and backward, `masked` target tokens that the decoder does not see."""

    def masked(batch: TokenBatch) -> int:
        content_K = batch.rows.tokens_R[: batch.rows.n_keys]
        return int((content_K == model.ids.mask).sum()) // batch.copies

    def flops(batch: TokenBatch) -> int:
        return batch_flops(model.config, batch).training + deciding_flops(model.config, batch)

    return {"flops": flops, "masked": masked}


def parameters_by_part(model: nn.Module) -> Mapping[str, int]:
    """{part: number of parameters}; the token table counts once, though the head uses it too. Works on `meta`."""
    parts = {"token table, also the head": 0, "positions": 0, "encoder": 0, "decoder": 0, "length head": 0}
    for name, parameter in model.named_parameters():
        if name.startswith("shared."):
            part = "token table, also the head"
        elif "embed_positions" in name:
            part = "positions"
        else:
            part = name.split(".")[0].replace("_", " ")
        parts[part] = parts.get(part, 0) + parameter.numel()
    return {part: count for part, count in parts.items() if count}

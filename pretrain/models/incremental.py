"""Writing token by token: the decoder with its past kept as keys and values.

The encoder's output is projected once per source. Each layer keeps the keys and values of the content rows in one
buffer whose hypotheses lie `max_length` rows apart, so that `sample_attention` reads the past as a view.

Shapes: N hypotheses, L rows of a hypothesis, R rows of a step, M memory rows, D width, H heads, E head width,
V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from parlance_kernels import SampleMask
from pretrain.models.encoder_decoder import EncoderDecoder
from pretrain.models.layers import DecoderLayer
from pretrain.models.patterns import ArLayout
from pretrain.models.rows import DecoderRows, SourceRows

KeysValues = tuple[Tensor, Tensor]
StreamName = Literal["query", "content"]


def project_memory(model: EncoderDecoder, memory_MD: Tensor) -> list[KeysValues]:
    """Cross-attention keys and values [M, H, E] of every decoder layer."""
    return [layer.encoder_attn.keys_values(memory_MD) for layer in _layers(model)]


def decode_over(model: EncoderDecoder, rows: DecoderRows, memory: list[KeysValues]) -> Tensor:
    """h_LD as `model.decode(rows, memory_MD)` gives it, over a memory that `project_memory` has projected.

    Refinement decodes over the same source many times; the projection of the source is then paid once.
    """
    x_RD = model.decoder.embed(model.shared(rows.tokens_R) * model.scale, rows.positions_R)
    last = len(memory) - 1
    for index, layer in enumerate(_layers(model)):
        y_RD = layer.self_attn_layer_norm(x_RD) if layer.pre_norm else x_RD
        keys = layer.self_attn.keys_values(y_RD[: rows.n_keys])
        masks = rows.self_mask, rows.cross_mask
        if index == last:
            x_RD, y_RD = x_RD[rows.out_L], y_RD[rows.out_L]
            masks = rows.out_self_mask, rows.out_cross_mask
        x_RD = layer.rows(x_RD, y_RD, keys, memory[index], *masks)
    return model.decoder.layer_norm(x_RD)


class IncrementalDecoder:
    """Left-to-right decoding state of many hypotheses that advance together.

    It starts with one hypothesis a source and holds up to `capacity`. On the `query` stream (JANUS) each step
    appends the content row of the token and reads the prediction from a MASK row beside it; on the `content`
    stream (BART) the content row itself predicts. The model must be in eval mode.

    Args:
        source: the encoder's input; encoded here.
        layout: where the pattern starts and which position its query rows carry.
        max_length: tokens a hypothesis may be fed, at most the model's positions.
        capacity: largest number of hypotheses after any `reorder`.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        source: SourceRows,
        layout: ArLayout,
        stream: StreamName,
        max_length: int,
        capacity: int,
    ) -> None:
        if max_length > model.config.max_positions:
            raise ValueError(f"max_length must be at most {model.config.max_positions} positions, got {max_length}")
        self.model, self.layout, self.stream = model, layout, stream
        self.max_length, self.capacity = max_length, capacity
        self.memory = project_memory(model, model.encode(source))
        self.ranges_B2 = np.array([source.memory_range(index) for index in range(source.n_samples)]).reshape(-1, 2)
        self.n_memory = source.mask.n_rows
        self.length = 0
        self.owner_N = np.arange(source.n_samples)
        self.cross_masks: dict[int, SampleMask] = {}
        head_width = model.config.d_model // model.config.heads
        shape = capacity, max_length, model.config.heads, head_width
        like = model.shared.weight
        self.cache = [(like.new_empty(shape), like.new_empty(shape)) for _ in model.decoder.layers]

    @property
    def n_hypotheses(self) -> int:
        return len(self.owner_N)

    def step(self, tokens_N: Tensor) -> Tensor:
        """Appends one token (int64 [N]) to every hypothesis; returns logits_NV of the token after it."""
        if self.length >= self.max_length:
            raise ValueError(f"at most {self.max_length} tokens may be fed, as max_length says")
        model, time, hypotheses = self.model, self.length, self.n_hypotheses
        per_step = 2 if self.stream == "query" else 1
        x_RD = self._embed(tokens_N)
        self.length += 1
        last = len(self.cache) - 1
        masks = self._self_mask(per_step), self._cross_mask(per_step)
        for index, layer in enumerate(_layers(model)):
            y_RD = layer.self_attn_layer_norm(x_RD) if layer.pre_norm else x_RD
            k_NHE, v_NHE = layer.self_attn.keys_values(y_RD[::per_step])
            k_NLHE, v_NLHE = (buffer[:hypotheses] for buffer in self.cache[index])
            k_NLHE[:, time], v_NLHE[:, time] = k_NHE, v_NHE
            if index == last and per_step == 2:
                x_RD, y_RD = x_RD[1::2], y_RD[1::2]
                masks = self._self_mask(1), self._cross_mask(1)
            keys = k_NLHE.flatten(0, 1), v_NLHE.flatten(0, 1)
            x_RD = layer.rows(x_RD, y_RD, keys, self.memory[index], *masks)
        return model.logits(model.decoder.layer_norm(x_RD))

    def reorder(self, indices: Tensor) -> None:
        """Hypothesis i becomes what hypothesis indices[i] was; indices may repeat, drop and change in number.

        indices: int64 [N'], N' <= capacity. Order kept by source is read fastest.
        """
        host = indices.cpu().numpy()
        if len(host) > self.capacity:
            raise ValueError(f"at most {self.capacity} hypotheses fit, as capacity says, got {len(host)}")
        if np.array_equal(host, np.arange(self.n_hypotheses)):
            return
        moved = np.flatnonzero(host != np.arange(len(host)))
        to_N = torch.from_numpy(moved).to(indices.device)
        from_N = indices[to_N]
        for pair in self.cache:
            for buffer in pair:
                past = buffer[:, : self.length]
                past[to_N] = past[from_N]  # the right side is copied first, so that hypotheses may change places
        owner_N = self.owner_N[host]
        if not np.array_equal(owner_N, self.owner_N):
            self.owner_N, self.cross_masks = owner_N, {}

    def _embed(self, tokens_N: Tensor) -> Tensor:
        """Content rows, on the query stream each with its MASK row behind it, so that both read as one segment."""
        model, time = self.model, self.length
        content_ND = model.shared(tokens_N) * model.scale
        content_ND = model.decoder.embed(content_ND, torch.full_like(tokens_N, time))
        if self.stream == "content":
            return content_ND
        mask_N = torch.full_like(tokens_N, self.layout.ids.mask)
        position_N = torch.full_like(tokens_N, time + self.layout.query_position_offset)
        query_ND = model.decoder.embed(model.shared(mask_N) * model.scale, position_N)
        return torch.stack((content_ND, query_ND), dim=1).flatten(0, 1)

    def _self_mask(self, rows: int) -> SampleMask:
        table = [(n * rows, rows, n * self.max_length, self.length, 0, 0, 0, 0) for n in range(self.n_hypotheses)]
        return SampleMask.build(table, self.n_hypotheses * self.max_length)

    def _cross_mask(self, rows: int) -> SampleMask:
        if rows not in self.cross_masks:
            table = [(n * rows, rows, *self.ranges_B2[o], 0, 0, 0, 0) for n, o in enumerate(self.owner_N)]
            self.cross_masks[rows] = SampleMask.build(table, self.n_memory).merged()
        return self.cross_masks[rows]


def _layers(model: EncoderDecoder) -> Sequence[DecoderLayer]:
    return cast(Sequence[DecoderLayer], model.decoder.layers)

"""The network on padded batches of fixed shape, so that a CUDA graph can replay it for any texts that fit.

The layers are those of the packed rows, and so are the results at rows inside a text. What differs is who says how long
a text is: here a tensor on the device does, and no shape, address or launch depends on it. Rows outside a text are
computed and read by nobody; they start as zeros, so that nothing of them can leak through a weight of 0.

Shapes: B sources, S tokens of the longest, C texts, T tokens of the longest, W rows of a text that are used, K
hypotheses of a source, L slots of each, R rows of a hypothesis and step, D width, H heads, E head width, V vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from pretrain.models.encoder_decoder import EncoderDecoder, Stack
from pretrain.models.incremental import KeysValues, StreamName
from pretrain.models.layers import DecoderLayer
from pretrain.models.patterns import ArLayout


def inside(length_B: Tensor, size: int) -> Tensor:
    """bool [B, size]: which columns belong to texts of these lengths."""
    return torch.arange(size, device=length_B.device) < length_B[:, None]


def bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores: 0 where a key is read, -inf elsewhere. Once a pass, not once a layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def embed(model: EncoderDecoder, stack: Stack, tokens_BT: Tensor, inside_BT: Tensor) -> Tensor:
    """x_BTD: the input of the first layer for texts from position 0, zeros outside them.

    The batch may be wider than the model has positions.
    """
    columns_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    x_BTD = stack.embed(model.shared(tokens_BT) * model.scale, columns_T.clamp(max=model.config.max_positions - 1))
    return x_BTD.masked_fill(~inside_BT[:, :, None], 0.0)


def encode(model: EncoderDecoder, tokens_BS: Tensor, inside_BS: Tensor) -> Tensor:
    """memory_BSD. Every source must have a token."""
    x_BSD = embed(model, model.encoder, tokens_BS, inside_BS)
    bias_B11S = bias(inside_BS[:, None, None], x_BSD.dtype)
    for layer in model.encoder.layers:
        x_BSD = layer(x_BSD, bias_B11S)
    return model.encoder.layer_norm(x_BSD)


def length_logits(model: EncoderDecoder, memory_BSD: Tensor, inside_BS: Tensor) -> Tensor:
    """[B, N] as `EncoderDecoder.length_logits`."""
    sums_BD = memory_BSD.masked_fill(~inside_BS[:, :, None], 0.0).sum(dim=1)
    return model.length_head(sums_BD / inside_BS.sum(dim=1, keepdim=True).to(sums_BD.dtype))


def project_memory(model: EncoderDecoder, memory_BSD: Tensor, memory: Sequence[KeysValues]) -> None:
    """Writes cross-attention keys and values [B, S, H, E] of every decoder layer into `memory`."""
    for layer, buffers in zip(layers_of(model), memory, strict=True):
        for buffer, made in zip(buffers, layer.encoder_attn.keys_values(memory_BSD), strict=True):
            buffer.copy_(made)


def keys_values_buffers(model: EncoderDecoder, *shape: int) -> list[KeysValues]:
    """Keys and values [*shape, H, E] of every decoder layer, all zeros: keys that nobody reads must be finite."""
    config, like = model.config, model.shared.weight
    whole = *shape, config.heads, config.d_model // config.heads
    return [(like.new_zeros(whole), like.new_zeros(whole)) for _ in model.decoder.layers]


def keys_values_bytes(model: EncoderDecoder, rows: int) -> int:
    """What so many rows of `keys_values_buffers` take."""
    return 2 * len(model.decoder.layers) * rows * model.config.d_model * model.shared.weight.itemsize


def decode(
    model: EncoderDecoder,
    tokens_CT: Tensor,
    inside_CT: Tensor,
    memory: Sequence[KeysValues],
    memory_bias_B11S: Tensor,
    used_CW: Tensor | None = None,
) -> Tensor:
    """h_CWD, the decoder's output where all rows of a text read each other; texts of one source lie side by side.

    used_CW: columns that the last layer computes; None: all.
    """
    x_CTD = embed(model, model.decoder, tokens_CT, inside_CT)
    bias_C11T = bias(inside_CT[:, None, None], x_CTD.dtype)
    for number, layer in enumerate(layers_of(model), start=1):
        y_CTD = layer.self_attn_layer_norm(x_CTD) if layer.pre_norm else x_CTD
        keys = layer.self_attn.keys_values(y_CTD)
        if number == len(memory) and used_CW is not None:
            x_CTD, y_CTD = _columns(x_CTD, used_CW), _columns(y_CTD, used_CW)
        x_CTD = layer.rows(x_CTD, y_CTD, keys, memory[number - 1], bias_C11T, memory_bias_B11S)
    return model.decoder.layer_norm(x_CTD)


class BeamCache:
    """The past of K hypotheses of each source as keys and values that never move.

    A hypothesis writes what it appends into its own slots. `owner_BKL` tells whose slot holds each token of its past,
    so that a beam is reordered by reordering these numbers: its K hypotheses read the slots of all K, each under its
    own mask, which costs no more bytes than when each reads its own.

    time: int64 [1], how many tokens were appended. Everything here is on the device, at fixed addresses.
    """

    def __init__(
        self, model: EncoderDecoder, layout: ArLayout, stream: StreamName, sources: int, hypotheses: int, slots: int
    ) -> None:
        self.model, self.layout, self.rows = model, layout, 2 if stream == "query" else 1
        self.cache = keys_values_buffers(model, sources, hypotheses, slots)
        device = model.shared.weight.device
        self.time = torch.zeros(1, dtype=torch.int64, device=device)
        self.owner_BKL = torch.zeros(sources, hypotheses, slots, dtype=torch.int64, device=device)

    def clear(self) -> None:
        self.time.zero_()

    def reorder(self, parent_BK: Tensor) -> None:
        """Hypothesis k of a source becomes what its hypothesis parent_BK[:, k] was."""
        self.owner_BKL.copy_(self.owner_BKL.gather(1, parent_BK[:, :, None].expand_as(self.owner_BKL)))

    def append(self, tokens_BK: Tensor, memory: Sequence[KeysValues], memory_bias_B11S: Tensor) -> Tensor:
        """Appends a token to every hypothesis; h_BKD predicts the one after it."""
        model, rows = self.model, self.rows
        sources, hypotheses, slots = self.owner_BKL.shape
        own_K = torch.arange(hypotheses, device=tokens_BK.device)
        self.owner_BKL.index_copy_(2, self.time, own_K[:, None].expand(sources, hypotheses, 1))
        past_L = torch.arange(slots, device=tokens_BK.device) <= self.time
        seen_BKKL = (self.owner_BKL[:, :, None] == own_K[:, None]) & past_L
        x_BMD = self._embed(tokens_BK)  # M = K * R
        bias_B1KL = bias(seen_BKKL.flatten(2)[:, None], x_BMD.dtype)
        bias_B1ML = bias_B1KL if rows == 1 else bias_B1KL.repeat_interleave(rows, dim=2)
        for index, layer in enumerate(layers_of(model)):
            y_BMD = layer.self_attn_layer_norm(x_BMD) if layer.pre_norm else x_BMD
            for buffer, new_BKHE in zip(self.cache[index], layer.self_attn.keys_values(y_BMD[:, ::rows]), strict=True):
                buffer.index_copy_(2, self.time, new_BKHE[:, :, None])
            if index == len(self.cache) - 1:
                x_BMD, y_BMD, bias_B1ML = x_BMD[:, rows - 1 :: rows], y_BMD[:, rows - 1 :: rows], bias_B1KL
            k_BLHE, v_BLHE = (buffer.flatten(1, 2) for buffer in self.cache[index])
            x_BMD = layer.rows(x_BMD, y_BMD, (k_BLHE, v_BLHE), memory[index], bias_B1ML, memory_bias_B11S)
        self.time += 1
        return model.decoder.layer_norm(x_BMD)

    def _embed(self, tokens_BK: Tensor) -> Tensor:
        """[B, K * R, D]: content rows, on the query stream each with its MASK row behind it."""
        model = self.model
        content_BKD = model.decoder.embed(model.shared(tokens_BK) * model.scale, self.time)
        if self.rows == 1:
            return content_BKD
        mask_BK = torch.full_like(tokens_BK, self.layout.ids.mask)
        position = self.time + self.layout.query_position_offset
        query_BKD = model.decoder.embed(model.shared(mask_BK) * model.scale, position)
        return torch.stack((content_BKD, query_BKD), dim=2).flatten(1, 2)


def layers_of(model: EncoderDecoder) -> Sequence[DecoderLayer]:
    """The decoder's layers."""
    return cast(Sequence[DecoderLayer], model.decoder.layers)


def _columns(x_CTD: Tensor, used_CW: Tensor) -> Tensor:
    return x_CTD.gather(1, used_CW[:, :, None].expand(-1, -1, x_CTD.shape[2]))

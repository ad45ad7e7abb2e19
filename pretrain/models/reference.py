"""The model by its definition: padded batches, dense B x T x S masks, materialised attention, all-row outputs.

It shares the weights of `EncoderDecoder` and nothing else; tests hold the packed path equal to it.

Shapes: B samples, S source length, T content rows, Q query rows, K keys, D width, H heads, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.encoder_decoder import EncoderDecoder, Stack
from pretrain.models.layers import Attention, DecoderLayer, EncoderLayer


def attend(attention: Attention, q_BQD: Tensor, kv_BKD: Tensor, visible_BQK: Tensor) -> Tensor:
    """Multi-head attention with the score matrix written out; rows that see nothing are left undefined."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (attention.heads, -1)).transpose(1, 2)

    q, k, v = heads(attention.q_proj(q_BQD)), heads(attention.k_proj(kv_BKD)), heads(attention.v_proj(kv_BKD))
    scores = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])
    p = scores.masked_fill(~visible_BQK[:, None], float("-inf")).softmax(dim=-1)
    p = F.dropout(p, attention.dropout, attention.training)
    return attention.out_proj((p @ v).transpose(1, 2).flatten(2))


def embed(model: EncoderDecoder, stack: Stack, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Input of the first layer."""
    return stack.embed(model.shared(tokens_BT) * model.scale, positions_BT)


def encode(model: EncoderDecoder, tokens_BS: Tensor, positions_BS: Tensor, real_BS: Tensor) -> Tensor:
    """memory_BSD of padded sources; real_BS is False on padding."""
    x = embed(model, model.encoder, tokens_BS, positions_BS)
    visible = real_BS[:, None, :].expand(-1, tokens_BS.shape[1], -1)
    for layer in model.encoder.layers:
        assert isinstance(layer, EncoderLayer)
        y = layer.self_attn_layer_norm(x) if layer.pre_norm else x
        x = x + layer.dropout(attend(layer.self_attn, y, y, visible))
        x = x if layer.pre_norm else layer.self_attn_layer_norm(x)
        y = layer.final_layer_norm(x) if layer.pre_norm else x
        x = x + layer.dropout(layer.feed_forward(y, layer.fc1, layer.fc2))
        x = x if layer.pre_norm else layer.final_layer_norm(x)
    return model.encoder.layer_norm(x)


def decode(
    model: EncoderDecoder,
    content: tuple[Tensor, Tensor, Tensor],
    query: tuple[Tensor, Tensor, Tensor] | None,
    memory_BSD: Tensor,
    real_BS: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Hidden states of all content rows and all query rows.

    content, query: (tokens, positions, visible); visible is bool [B, T or Q, T]: who reads which content row.
    Keys of both streams are the content stream's layer inputs (JANUS, section 3.1).
    """
    h = embed(model, model.decoder, content[0], content[1])
    g = None if query is None else embed(model, model.decoder, query[0], query[1])
    for layer in model.decoder.layers:
        assert isinstance(layer, DecoderLayer)
        keys = layer.self_attn_layer_norm(h) if layer.pre_norm else h
        g = None if g is None or query is None else decoder_layer(layer, g, keys, query[2], memory_BSD, real_BS)
        h = decoder_layer(layer, h, keys, content[2], memory_BSD, real_BS)
    norm: nn.Module = model.decoder.layer_norm
    return norm(h), None if g is None else norm(g)


def length_logits(model: EncoderDecoder, memory_BSD: Tensor, real_BS: Tensor) -> Tensor:
    """[B, classes] from the mean of the real source rows."""
    weight_BS1 = real_BS[:, :, None].to(memory_BSD.dtype)
    return model.length_head((memory_BSD * weight_BS1).sum(1) / weight_BS1.sum(1))


def decoder_layer(
    layer: DecoderLayer, x: Tensor, keys: Tensor, visible: Tensor, memory_BSD: Tensor, real_BS: Tensor
) -> Tensor:
    """The layer for rows x [B, T, D] over `keys` (the content rows, normalised in pre-norm) and the memory."""
    y = layer.self_attn_layer_norm(x) if layer.pre_norm else x
    x = x + layer.dropout(attend(layer.self_attn, y, keys, visible))
    x = x if layer.pre_norm else layer.self_attn_layer_norm(x)
    y = layer.encoder_attn_layer_norm(x) if layer.pre_norm else x
    cross = real_BS[:, None, :].expand(-1, x.shape[1], -1)
    x = x + layer.dropout(attend(layer.encoder_attn, y, memory_BSD, cross))
    x = x if layer.pre_norm else layer.encoder_attn_layer_norm(x)
    y = layer.final_layer_norm(x) if layer.pre_norm else x
    x = x + layer.dropout(layer.feed_forward(y, layer.fc1, layer.fc2))
    return x if layer.pre_norm else layer.final_layer_norm(x)


def pad(rows: list[Tensor], value: int) -> Tensor:
    """[B, longest] int64 of ragged rows."""
    longest = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, longest - len(row)), value=value) for row in rows])

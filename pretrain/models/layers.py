"""Transformer layers over packed rows. Names follow BART, so that its weights map one to one.

Where the mask is a tensor, rows are padded instead, with the batch in front: [B, T, D] in place of [R, D] everywhere.

Shapes: R rows, K keys, M memory rows, D width, H heads, E head width, F feed-forward width; padded: B batch, C texts,
T rows of each, S keys.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parlance_kernels import SampleMask, sample_attention
from pretrain.config import ModelConfig
from pretrain.models.linear import Linear

Mask = SampleMask | Tensor  # of packed rows, or of padded ones as `padded_attention` takes it
POSITION_OFFSET = 2  # BART's and fairseq's learned tables keep their first two rows unused.


class Attention(nn.Module):
    """Multi-head attention whose keys may be projected once and read by many rows."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        width = config.d_model
        self.heads, self.dropout, self.backend = config.heads, config.attention_dropout, backend
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.out_proj = Linear(width, width), Linear(width, width)

    def keys_values(self, x_KD: Tensor) -> tuple[Tensor, Tensor]:
        """k_KHE and v_KHE of the rows that are read."""
        return self._heads(self.k_proj(x_KD)), self._heads(self.v_proj(x_KD))

    def forward(self, x_RD: Tensor, k_KHE: Tensor, v_KHE: Tensor, mask: Mask) -> Tensor:
        """[R, D]: each row of x reads the keys that `mask` grants it."""
        q_RHE = self._heads(self.q_proj(x_RD))
        p = self.dropout if self.training else 0.0
        if isinstance(mask, Tensor):
            o_RHE = padded_attention(q_RHE, k_KHE, v_KHE, mask, p)
        else:
            o_RHE = sample_attention(q_RHE, k_KHE, v_KHE, mask, dropout_p=p, backend=self.backend)
        return self.out_proj(o_RHE.flatten(-2))

    def _heads(self, x_RD: Tensor) -> Tensor:
        return x_RD.unflatten(-1, (self.heads, -1))


def padded_attention(
    q_CTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, bias_B1TS: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """o_CTHE. C = B * n: where n texts read one source, its keys are not repeated.

    bias_B1TS: added to the scores, -inf where a row does not read a key; 1 in place of T where all rows read the same
    keys. A row must read at least one, and keys that nobody reads must be finite.
    """
    q_BHTE = q_CTHE.reshape(len(k_BSHE), -1, *q_CTHE.shape[2:]).transpose(1, 2)
    k_BHSE, v_BHSE = k_BSHE.transpose(1, 2), v_BSHE.transpose(1, 2)
    o_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, attn_mask=bias_B1TS, dropout_p=dropout_p)
    return o_BHTE.transpose(1, 2).reshape(q_CTHE.shape)


class FeedForward(nn.Module):
    """fc2(dropout(activation(fc1(x)))); holds its layers on behalf of the layer that names them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = F.gelu if config.activation == "gelu" else F.relu
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x_RD: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
        return fc2(self.dropout(self.activation(fc1(x_RD))))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, post- or pre-norm."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.self_attn = Attention(config, backend)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1, self.fc2 = Linear(config.d_model, config.ffn_dim), Linear(config.ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_RD: Tensor, mask: Mask) -> Tensor:
        y_RD = self.self_attn_layer_norm(x_RD) if self.pre_norm else x_RD
        y_RD = self.self_attn(y_RD, *self.self_attn.keys_values(y_RD), mask)
        x_RD = x_RD + self.dropout(y_RD)
        if not self.pre_norm:
            x_RD = self.self_attn_layer_norm(x_RD)
        y_RD = self.final_layer_norm(x_RD) if self.pre_norm else x_RD
        x_RD = x_RD + self.dropout(self.feed_forward(y_RD, self.fc1, self.fc2))
        return x_RD if self.pre_norm else self.final_layer_norm(x_RD)


class DecoderLayer(nn.Module):
    """Two-stream layer: every row reads keys made from the content rows of the layer's input."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.self_attn = Attention(config, backend)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = Attention(config, backend)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1, self.fc2 = Linear(config.d_model, config.ffn_dim), Linear(config.ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_RD: Tensor,
        n_keys: int,
        out_L: Tensor | None,
        memory_MD: Tensor,
        self_mask: SampleMask,
        cross_mask: SampleMask,
        key_K: Tensor | None = None,
    ) -> Tensor:
        """Rows out_L (all rows for None) of the layer's output; the first n_keys rows of x are the keys.

        key_K: the keys that the mask speaks of, as rows of x; None: those n_keys in their order.
        """
        y_RD = self.self_attn_layer_norm(x_RD) if self.pre_norm else x_RD
        k_KHE, v_KHE = self.self_attn.keys_values(y_RD[:n_keys])
        if key_K is not None:
            k_KHE, v_KHE = k_KHE.index_select(0, key_K), v_KHE.index_select(0, key_K)
        if out_L is not None:
            x_RD = x_RD.index_select(0, out_L)
            y_RD = y_RD.index_select(0, out_L) if self.pre_norm else x_RD
        memory = self.encoder_attn.keys_values(memory_MD)
        return self.rows(x_RD, y_RD, (k_KHE, v_KHE), memory, self_mask, cross_mask)

    def rows(
        self,
        x_RD: Tensor,
        y_RD: Tensor,
        keys: tuple[Tensor, Tensor],
        memory: tuple[Tensor, Tensor],
        self_mask: Mask,
        cross_mask: Mask,
    ) -> Tensor:
        """The layer for rows x (y: the same, normalised in pre-norm) over keys that are projected already."""
        x_RD = x_RD + self.dropout(self.self_attn(y_RD, *keys, self_mask))
        if not self.pre_norm:
            x_RD = self.self_attn_layer_norm(x_RD)
        y_RD = self.encoder_attn_layer_norm(x_RD) if self.pre_norm else x_RD
        x_RD = x_RD + self.dropout(self.encoder_attn(y_RD, *memory, cross_mask))
        if not self.pre_norm:
            x_RD = self.encoder_attn_layer_norm(x_RD)
        y_RD = self.final_layer_norm(x_RD) if self.pre_norm else x_RD
        x_RD = x_RD + self.dropout(self.feed_forward(y_RD, self.fc1, self.fc2))
        return x_RD if self.pre_norm else self.final_layer_norm(x_RD)


class LearnedPositions(nn.Embedding):
    """A trained table; position p is row p + 2."""

    def __init__(self, max_positions: int, width: int) -> None:
        super().__init__(max_positions + POSITION_OFFSET, width)

    def forward(self, positions_R: Tensor) -> Tensor:
        return super().forward(positions_R + POSITION_OFFSET)


class SinusoidalPositions(nn.Module):
    """Sines in the first half of the width, cosines in the second (tensor2tensor's layout)."""

    table_PD: Tensor

    def __init__(self, max_positions: int, width: int) -> None:
        super().__init__()
        half = width // 2
        step = math.log(10_000.0) / max(1, half - 1)
        angle = torch.arange(max_positions)[:, None] * torch.exp(-step * torch.arange(half))
        table_PD = torch.zeros(max_positions, width)
        table_PD[:, :half], table_PD[:, half : 2 * half] = angle.sin(), angle.cos()
        self.register_buffer("table_PD", table_PD, persistent=False)

    def forward(self, positions_R: Tensor) -> Tensor:
        return self.table_PD[positions_R]


def positions_table(config: ModelConfig) -> nn.Module:
    """The position embedding that `config.positions` names."""
    kind = LearnedPositions if config.positions == "learned" else SinusoidalPositions
    return kind(config.max_positions, config.d_model)

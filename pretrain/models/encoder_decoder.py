"""The encoder-decoder that every objective and decoder shares: BART's weights, packed rows, two streams.

Shapes: R rows, L rows with a use, M memory rows, B samples, D width, V vocabulary, N length classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parlance_kernels import VocabPart, exit_copy, resolve, vocab_loss
from pretrain.config import ModelConfig
from pretrain.models.exits import ExitRows
from pretrain.models.ids import SpecialIds
from pretrain.models.layers import DecoderLayer, EncoderLayer, positions_table
from pretrain.models.linear import PairLinear, linear
from pretrain.models.rows import DecoderRows, SourceRows

MAX_LOGITS = 1 << 25  # entries of a logits block: 128 MiB in float32
Reduction = Callable[[Tensor], tuple[Tensor, ...]]


@contextmanager
def writing(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside, the former mode outside."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Stack(nn.Module):
    """What encoder and decoder have in common: position table, embedding norm, layers, final norm in pre-norm."""

    def __init__(self, config: ModelConfig, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed_positions = positions_table(config)
        self.layernorm_embedding = nn.LayerNorm(config.d_model) if config.embed_norm else nn.Identity()
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(config.d_model) if config.norm == "pre" else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, token_RD: Tensor, positions_R: Tensor) -> Tensor:
        """The input of the first layer."""
        # A sinusoidal table is a buffer, which engines leave in fp32 when the weights are in 16 bits.
        position_RD = self.embed_positions(positions_R).to(token_RD.dtype)
        return self.dropout(self.layernorm_embedding(token_RD + position_RD))


@dataclass(frozen=True)
class VocabTargets:
    """What `vocab_loss` needs besides hidden states and weights; its docstring explains each field."""

    target_R: Tensor
    term_R: Tensor
    tuple_PK: Tensor
    ce_scale: Sequence[float]
    kl_pairs: Sequence[tuple[int, int]] = ()
    kl_scale: Sequence[float] = ()
    label_smoothing: float = 0.0


class VocabHead(nn.Module):
    """The projection onto the vocabulary. Its weight is `table`'s: the token table itself at the top of the decoder.

    backend: implementation of the operators that reduce its logits. part: the tokens whose logits this rank computes;
    None: all. Beyond them the weight may have rows that stand for nothing.
    """

    bias_V: Tensor | None
    part: VocabPart | None = None

    def __init__(self, table: nn.Embedding, bias: bool, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.weight = table.weight
        self.register_buffer("bias_V", torch.zeros(table.num_embeddings) if bias else None)

    def forward(
        self, h_LD: Tensor, loss: VocabTargets | None = None, reduction: Reduction | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits [L, V], or with `loss` the results of `vocab_loss` for these rows.

        reduction: makes tensors [l] of logits [l, V], which then never exist for more than `MAX_LOGITS` entries. In one
        forward, because the ranks of ZeRO-3 must call it equally often however many rows they have. Where the head has
        a `part`, it gets the logits of that part.
        """
        weight_VD, bias_V, part = self.weight, self.bias_V, self.part
        if part is not None:
            weight_VD = weight_VD if len(weight_VD) == part.size else weight_VD[: part.size]
            bias_V = None if bias_V is None else bias_V[part.start : part.start + part.size]
        if loss is not None:
            return vocab_loss(h_LD, weight_VD, bias_V=bias_V, **vars(loss), backend=self.backend, part=part)
        bias_V = None if bias_V is None else bias_V.to(h_LD.dtype)  # a buffer, too
        if reduction is None:
            logits_LV = linear(h_LD, weight_VD, bias_V)
            return logits_LV if part is None else part.joined(logits_LV.detach())
        block = max(1, MAX_LOGITS // len(weight_VD))
        parts = [reduction(linear(some_LD, weight_VD, bias_V)) for some_LD in h_LD.split(block)]
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))


class EncoderDecoder(nn.Module):
    """Encoder, two-stream decoder, tied vocabulary head and length predictor.

    Parameter names are those of Hugging Face's `BartModel`; `length_head.weight` is added, and where the configuration
    asks for them `feedback.weight` (`soft_exit`) and `ramps.N.weight` (`off_ramps: separate`; the last layer has
    the token table).

    Args:
        config: shape and dropout; `vocab_size` must be set.
        ids: special tokens of the tokenizer the model belongs to.
        activation_checkpointing: recompute each layer in the backward instead of keeping its activations.
        backend: implementation of the operators, resolved once here.
    """

    def __init__(
        self, config: ModelConfig, ids: SpecialIds, activation_checkpointing: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("`model.vocab_size` must be set before a model is built, got None")
        self.config, self.ids, self.checkpointing = config, ids, activation_checkpointing
        self.backend = resolve(backend)
        self.scale = math.sqrt(config.d_model) if config.embed_scale else 1.0
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, [EncoderLayer(config, self.backend) for _ in range(config.encoder_layers)])
        self.decoder = Stack(config, [DecoderLayer(config, self.backend) for _ in range(config.decoder_layers)])
        self.head = VocabHead(self.shared, config.logits_bias, self.backend)
        self.length_head = nn.Linear(config.d_model, config.length_classes, bias=False)
        if config.soft_exit:
            self.feedback = PairLinear(2 * config.d_model, config.d_model, bias=False)
        own = config.decoder_layers - 1 if config.off_ramps == "separate" else 0
        tables = [nn.Embedding(config.vocab_size, config.d_model) for _ in range(own)]
        self.ramps = nn.ModuleList(VocabHead(table, config.logits_bias, self.backend) for table in tables)
        self.apply(self._initialise)
        with torch.no_grad():
            self.shared.weight[ids.pad].zero_()
        self._begin_ramps()

    def grown(self, config: ModelConfig) -> "EncoderDecoder":
        """A model with parameters that this one lacks; the others, and how it computes, are its own.

        Raises:
            ValueError: the other model lacks some of these parameters. RuntimeError: it reshapes some.
        """
        model = EncoderDecoder(config, self.ids, self.checkpointing, self.backend).to(self.shared.weight)
        unknown = self.state_dict().keys() - model.state_dict().keys()
        if unknown:
            raise ValueError(f"a grown model must keep every parameter, it lacks {', '.join(sorted(unknown))}")
        model.load_state_dict(self.state_dict(), strict=False)
        if not self.ramps:
            model._begin_ramps()
        return model.train(self.training)

    def encode(self, source: SourceRows) -> Tensor:
        """memory_MD, the encoder's output for every source row."""
        x_RD = self.encoder.embed(self.shared(source.tokens_R) * self.scale, source.positions_R)
        for layer in self.encoder.layers:
            x_RD = self.run_layer(layer, x_RD, source.mask)
        return self.encoder.layer_norm(x_RD)

    def decode(self, rows: DecoderRows | ExitRows, memory_MD: Tensor) -> Tensor:
        """h_LD, the decoder's output at the rows that are used; of `ExitRows`, the states that leave."""
        x_RD = self.decoder.embed(self.shared(rows.tokens_R) * self.scale, rows.positions_R)
        if isinstance(rows, ExitRows):
            return self.decoder.layer_norm(self._leave(x_RD, rows, memory_MD))
        *inner, last = self.decoder.layers
        for layer in inner:
            x_RD = self.run_layer(layer, x_RD, rows.n_keys, None, memory_MD, rows.self_mask, rows.cross_mask)
        masks = rows.out_self_mask, rows.out_cross_mask
        return self.decoder.layer_norm(self.run_layer(last, x_RD, rows.n_keys, rows.out_L, memory_MD, *masks))

    def decode_every_layer(self, rows: DecoderRows | ExitRows, memory_MD: Tensor) -> Tensor:
        """h_LD after each layer in turn, as one tensor: what an off-ramp there reads. Nothing leaves early."""
        x_RD = self.decoder.embed(self.shared(rows.tokens_R) * self.scale, rows.positions_R)
        states = []
        for layer in self.decoder.layers:
            x_RD = self.run_layer(layer, x_RD, rows.n_keys, None, memory_MD, rows.self_mask, rows.cross_mask)
            states.append(x_RD)
        return self.decoder.layer_norm(torch.cat(states))

    def _leave(self, table_UD: Tensor, rows: ExitRows, memory_MD: Tensor) -> Tensor:
        """Every token's state at the layer where it leaves, from the input of the first layer.

        Each layer runs, also when all have left: the ranks of ZeRO-3 call the same modules in the same order.
        """
        left: list[Tensor] = []
        for layer, plan in zip(self.decoder.layers, rows.layers, strict=True):
            masks = plan.self_mask, plan.cross_mask
            out_AD = self.run_layer(layer, table_UD, plan.states, plan.active_A, memory_MD, *masks, plan.key_K)
            table_UD, left_ND = exit_copy(
                table_UD, plan.frozen, out_AD, plan.left_N, plan.stays_S, rows.detach, self.backend
            )
            left.append(left_ND)
        return torch.cat(left)

    def logits(self, h_LD: Tensor) -> Tensor:
        """[L, V] scores of the next or hidden token."""
        return self.head(h_LD)

    def ramp(self, layer: int) -> VocabHead:
        """The head at a layer of the decoder, counted from 1."""
        return cast(VocabHead, self.ramps[layer - 1]) if layer <= len(self.ramps) else self.head

    def ramp_losses(self, h_LD: Tensor, sizes: Sequence[int], loss: VocabTargets) -> tuple[Tensor, Tensor]:
        """(total, ce_T) of `vocab_loss` for rows that lie by layers, `sizes` of each. Every head runs."""
        if not self.ramps:
            total, ce_T, _ = self.head(h_LD, loss)
            return total, ce_T
        parts = [x.split(list(sizes)) for x in (h_LD, loss.target_R, loss.term_R)]
        made = [
            self.ramp(layer)(h, replace(loss, target_R=target, term_R=term))
            for layer, (h, target, term) in enumerate(zip(*parts, strict=True), start=1)
        ]
        return torch.stack([total for total, *_ in made]).sum(), torch.stack([ce_T for _, ce_T, _ in made]).sum(dim=0)

    def length_logits(self, memory_MD: Tensor, source: SourceRows) -> Tensor:
        """[B, N]: classes are target lengths with BOS and EOS, from the mean over each sample's source rows."""
        sums_BD = memory_MD.new_zeros(source.n_samples, memory_MD.shape[1]).index_add(0, source.sample_R, memory_MD)
        rows_B = torch.bincount(source.sample_R, minlength=source.n_samples)
        return self.length_head(sums_BD / rows_B[:, None].to(sums_BD.dtype))

    def run_layer(self, layer: nn.Module, *args: object) -> Tensor:
        """layer(*args), computed again in the backward where activation checkpointing is on."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    @torch.no_grad()
    def _begin_ramps(self) -> None:
        for ramp in self.ramps:
            cast(VocabHead, ramp).weight.copy_(self.shared.weight)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

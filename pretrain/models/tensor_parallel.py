"""A built model cut over the ranks of a group, by the layers of megatron-core. Imported with a degree above 1 alone.

    token table, heads            rows of the vocabulary; as many on each rank, the last ones may stand for nothing
    q, k, v and fc1               columns: whole heads, and a part of the feed-forward width
    out_proj and fc2              rows; their outputs are summed over the group
    norms, positions, length head, feedback of soft exits: whole on every rank

All ranks of a group compute the same states, so they must draw the same dropout of states: their generators are equal.
What a rank alone computes, attention weights and the inside of the feed-forward, must be dropped independently: there a
seed is drawn from the shared generator, and another one follows from it for each rank. Nothing else is kept, so
activation checkpointing and resuming repeat the same draws. (megatron's own tracker of generators wants CUDA.)

Shapes: R rows, I inputs, O outputs, V vocabulary, D width.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from parlance_kernels import VocabPart
from pretrain.models.encoder_decoder import EncoderDecoder, VocabHead
from pretrain.models.layers import Attention, DecoderLayer, EncoderLayer, FeedForward

SEEDS = 1 << 62


class Cut(NamedTuple):
    """How a parameter lies over the ranks: cut along `dim`, where all parts together have `size`."""

    dim: int
    size: int

    def part(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """What one rank has of the whole; where the size does not divide, zeros are behind the last rows."""
        each = -(-self.size // ranks)
        behind = [0] * (2 * (whole.dim() - self.dim) - 1) + [each * ranks - self.size]
        return F.pad(whole, behind).narrow(self.dim, rank * each, each).contiguous()

    def whole(self, parts: list[Tensor]) -> Tensor:
        """The opposite of `part`."""
        return torch.cat(parts, dim=self.dim).narrow(self.dim, 0, self.size)


class Column(ColumnParallelLinear):
    """x W^T + b for some of the outputs; the gradient of x is summed over the group."""

    # its own is for another library's checkpoints and would be a buffer that is no tensor
    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state

    def forward(self, x_RI: Tensor) -> Tensor:
        y_RO: Tensor = super().forward(x_RI)[0]
        return y_RO


class Row(RowParallelLinear):
    """x W^T + b from some of the inputs; the output is summed over the group."""

    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state

    def forward(self, x_RI: Tensor) -> Tensor:
        y_RO: Tensor = super().forward(x_RI)[0]
        return y_RO


def cut_model(model: EncoderDecoder, group: dist.ProcessGroup) -> dict[str, Cut]:
    """Replaces layers of `model` by this rank's parts of them; {name: cut} of the parameters that are parts now.

    The model must be the same on every rank of the group; `check` says which models can be cut.
    """
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")  # overlap that we do not use
    rank, ranks = group.rank(), group.size()
    for layer in [*model.encoder.layers, *model.decoder.layers]:
        assert isinstance(layer, EncoderLayer | DecoderLayer)
        for attention in [part for part in layer.children() if isinstance(part, Attention)]:
            attention.heads //= ranks
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(attention, name, _column(getattr(attention, name), group))
            attention.out_proj = _row(attention.out_proj, group)
        layer.fc1, layer.fc2 = _column(layer.fc1, group), _row(layer.fc2, group)
    model.shared = _table(model.shared, group)
    model.head.weight = model.shared.weight
    vocabulary = model.config.vocab_size or 0
    each = -(-vocabulary // ranks)
    part = VocabPart(rank * each, min(each, vocabulary - rank * each), vocabulary, group)
    for head in [head for head in model.modules() if isinstance(head, VocabHead)]:
        if head is not model.head:
            head.weight = _part(head.weight, Cut(0, vocabulary), group)
        head.part = part
    for module in model.modules():
        if isinstance(module, Attention | FeedForward):
            module.forward = _apart(module, rank)  # type: ignore[method-assign]
    parameters: dict[str, Any] = dict(model.named_parameters())
    return {
        name: Cut(parameter.partition_dim, parameter.whole_size)
        for name, parameter in parameters.items()
        if hasattr(parameter, "whole_size")
    }


def _part(whole: Tensor, cut: Cut, group: dist.ProcessGroup) -> nn.Parameter:
    """This rank's part as a parameter that megatron-core and deepspeed know for one."""
    parameter: Any = nn.Parameter(cut.part(whole.detach(), group.rank(), group.size()))
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, cut.dim, 1
    parameter.whole_size = cut.size
    made: nn.Parameter = parameter
    return made


def _options(weight: Tensor) -> dict[str, Any]:
    config = ModelParallelConfig(
        tensor_model_parallel_size=2,  # above 1; the group has the number
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=weight.dtype,
    )
    return {"config": config, "init_method": lambda weight: weight}


def _column(linear: nn.Linear, group: dist.ProcessGroup) -> Any:
    made = Column(linear.in_features, linear.out_features, tp_group=group, **_options(linear.weight))
    made.weight = _part(linear.weight, Cut(0, linear.out_features), group)
    made.bias = _part(linear.bias, Cut(0, linear.out_features), group)
    return made


def _row(linear: nn.Linear, group: dist.ProcessGroup) -> Any:
    sizes = linear.in_features, linear.out_features
    how = {"bias": True, "input_is_parallel": True, "skip_bias_add": False}
    made = Row(*sizes, tp_group=group, **how, **_options(linear.weight))
    made.weight = _part(linear.weight, Cut(1, linear.in_features), group)
    made.bias = linear.bias
    return made


def _table(table: nn.Embedding, group: dist.ProcessGroup) -> Any:
    vocabulary, ranks = table.num_embeddings, group.size()
    padded = ranks * -(-vocabulary // ranks)
    made = VocabParallelEmbedding(padded, table.embedding_dim, tp_group=group, **_options(table.weight))
    made.weight = _part(table.weight, Cut(0, vocabulary), group)
    return made


def _apart(module: nn.Module, rank: int) -> Callable[..., Tensor]:
    """The forward of a module whose dropout is another one on every rank."""
    forward = module.forward

    def alone(*args: Any) -> Tensor:
        if not module.training:
            return forward(*args)
        with own_draws(rank, args[0].device):
            return forward(*args)

    return alone


@contextmanager
def own_draws(rank: int, device: torch.device) -> Iterator[None]:
    """Inside, generators are this rank's own; outside they advance by one draw, the same on every rank."""
    seed = int(torch.randint(SEEDS, ()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + rank)
        yield

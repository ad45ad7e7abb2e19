"""Which ranks share a model, and its weights by name as if none did.

    rank = data-parallel rank * degree + tensor-parallel rank

so that the ranks of a group are neighbours, and on one machine where a machine has as many. They read the same
micro-batches; gradients are reduced among the ranks that have the same part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from pretrain.config import ModelConfig
from pretrain.distributed import World, broadcast
from pretrain.errors import ConfigError
from pretrain.objectives.base import ObjectiveModule


class TensorParallel:
    """The two groups of this rank, also as the `mpu` of `deepspeed.initialize`.

    cuts: {name in the module: how the parameter lies over the group}, of those that are cut.
    """

    def __init__(self, module: ObjectiveModule, world: World) -> None:
        """Cuts the model of `module`; collective."""
        from pretrain.models.tensor_parallel import cut_model  # its library takes seconds to import

        self.world = world
        ranks = torch.arange(world.size).view(-1, world.tensor_parallel)
        self.group: Any = dist.new_subgroups_by_enumeration(ranks.tolist())[0]
        self.data_group: Any = dist.new_subgroups_by_enumeration(ranks.T.tolist())[0]
        self.cuts = {f"model.{name}": cut for name, cut in cut_model(module.model, self.group).items()}
        self._cut_parameters = {id(module.get_parameter(name)) for name in self.cuts}

    def broadcast(self, module: nn.Module) -> None:
        """Gives every rank the weights of the first one that has the same part."""
        parts = {module.get_parameter(name).data_ptr() for name in self.cuts}
        for value in module.state_dict().values():
            if value.data_ptr() in parts:
                broadcast(value, self.world.tensor_rank, self.data_group)
            else:
                broadcast(value, 0)

    def shape(self, name: str, part: Sequence[int]) -> tuple[int, ...]:
        """The whole shape of a parameter."""
        shape = list(part)
        if name in self.cuts:
            shape[self.cuts[name].dim] = self.cuts[name].size
        return tuple(shape)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that has the shape of the whole parameter."""
        return self.cuts[name].part(whole, self.group.rank(), self.group.size()) if name in self.cuts else whole

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The opposite of `part`; collective over the group."""
        if name not in self.cuts:
            return part
        mine = part.to(self.world.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.group.size())]
        dist.all_gather(parts, mine, group=self.group)
        return self.cuts[name].whole(parts).to(part.device)

    def norm(self, parameters: Sequence[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """L2 norm of the gradient of the whole model from (parameter, its gradient) on this rank."""
        kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
        for parameter, gradient in parameters:
            kinds[id(parameter) in self._cut_parameters].append(gradient)
        whole, cut = (nn.utils.get_total_norm(kind).to(self.world.device) for kind in kinds)
        square = cut.square()
        dist.all_reduce(square, group=self.group)
        return (square + whole.square()).sqrt()

    # ------------------------------------------------- what deepspeed asks for

    def get_model_parallel_group(self) -> Any:
        return self.group

    def get_model_parallel_rank(self) -> int:
        return self.world.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.world.tensor_parallel

    def get_data_parallel_group(self) -> Any:
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        return self.world.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.world.data_size


def check(config: ModelConfig, degree: int) -> None:
    """Raises ConfigError where a model cannot be cut into `degree` parts."""
    for key in ("heads", "ffn_dim"):
        value = getattr(config, key)
        if value % degree:
            raise ConfigError(f"`model.{key}` must be a multiple of `engine.tensor_parallel` ({degree}), got {value}")
    vocabulary = config.vocab_size or 0
    if -(-vocabulary // degree) * (degree - 1) >= vocabulary:
        raise ConfigError(
            f"`model.vocab_size` must give each of {degree} ranks a part (`engine.tensor_parallel`), for example "
            f"{degree * degree}, got {vocabulary}"
        )

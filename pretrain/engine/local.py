"""The engine in plain torch, for fine-tuning, debugging and as the judge of the other one.

bf16 works as in ZeRO: the module computes in bf16, an fp32 master of every weight takes the gradients and the updates.
Several ranks sum their gradients.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from pretrain.config import EngineConfig, OptimConfig
from pretrain.distributed import World
from pretrain.engine.base import Engine, StepResult, clip, nothing_to_gather
from pretrain.engine.tensor_parallel import TensorParallel
from pretrain.objectives.base import LossSums, ObjectiveModule
from pretrain.optim import MOMENTS, adamw, create_state, parameter_groups


class LocalEngine(Engine):
    """Every rank holds everything, or its part of a model that is shared."""

    loss_factor = 1.0

    def __init__(
        self,
        config: EngineConfig,
        optim: OptimConfig,
        module: ObjectiveModule,
        world: World,
        shared_by: TensorParallel | None = None,
    ) -> None:
        self.module, self.world, self.shared_by = module.to(world.device), world, shared_by
        self._clip = optim.clip
        groups = parameter_groups(module, optim.weight_decay)
        masters: dict[nn.Parameter, Tensor] = {p: p for p in module.parameters()}
        if config.precision == "bf16":
            masters = {p: p.detach().clone().requires_grad_() for p in module.parameters()}
            for parameter in module.parameters():  # buffers stay as they are, as in deepspeed
                parameter.data = parameter.data.bfloat16()
        self._masters = masters
        for group in groups:
            group["params"] = [masters[p] for p in group["params"]]
        self._adam = adamw(groups, optim)
        create_state(self._adam, masters.values())

    def step(self, lr: float) -> StepResult:
        same_part = self.shared_by.data_group if self.shared_by else None
        for master in self._masters.values():
            if master.grad is None:  # a weight that no term touched decays and loses momentum, as under ZeRO
                master.grad = torch.zeros_like(master)
            if self.world.data_size > 1:
                dist.all_reduce(master.grad, group=same_part)
        norm = clip(self._masters, self._clip, self.shared_by)
        applied = norm < float("inf")
        if applied:
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._adam.step()
            self.refresh()
        self._adam.zero_grad()
        return StepResult(norm, applied)

    def drop(self) -> None:
        self._adam.zero_grad()

    def gathered(self) -> AbstractContextManager[None]:
        return nothing_to_gather()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.parameters().items()}

    def _whole(self, name: str) -> dict[str, Tensor]:
        master = self._masters[self.module.get_parameter(name)]
        return {"param": master.detach()} | {key: self._adam.state[master][key] for key in MOMENTS}

    @torch.no_grad()
    def _write(self, name: str, state: Mapping[str, Tensor]) -> None:
        master = self._masters[self.module.get_parameter(name)]
        for key, value in state.items():
            (master if key == "param" else self._adam.state[master][key]).copy_(value)

    @torch.no_grad()
    def refresh(self) -> None:
        for parameter, master in self._masters.items():
            if master is not parameter:
                parameter.copy_(master)

    def _forward(self, batch: Any, scale: Mapping[str, float]) -> LossSums:
        terms: LossSums = self.module(batch, scale)[1]
        return terms

    def _forward_backward(self, batch: Any, scale: Mapping[str, float], last: bool) -> LossSums:
        total, terms = self.module(batch, scale)
        total.backward()
        for parameter, master in self._masters.items():
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None
        found: LossSums = terms
        return found

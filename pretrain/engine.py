"""The engine: the one place that runs forward, backward and the update, whatever computes them underneath.

Two implementations: `LocalEngine` (plain torch) and `DeepSpeedEngine` (ZeRO 0-3). What they share is here; their state
on disk (full fp32 tensors by parameter name) is the same too, so that a run moves between them, between ZeRO stages
and between numbers of ranks without a conversion.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from pretrain import engine_state
from pretrain.config import EngineConfig, OptimConfig
from pretrain.distributed import World
from pretrain.errors import ConfigError
from pretrain.objectives.base import LossSums, ObjectiveModule, Packed


@dataclass(frozen=True)
class StepResult:
    """What became of one update.

    grad_norm: L2 norm of the global gradient before clipping; inf or nan where it was not finite.
    applied: False if the gradient was not finite: weights and optimizer state are then untouched.
    loss_scale: the dynamic loss scale of fp16 after the step, None in other precisions.
    """

    grad_norm: float
    applied: bool
    loss_scale: float | None = None


class Engine(ABC):
    """Gradient accumulation, update, evaluation and state of one ObjectiveModule on this rank.

    module: weights in the precision of the forward.
    loss_factor: the loop passes scale[term] = weight * loss_factor / global_count, and the applied gradient is then the
        exact gradient of the global batch: the number of ranks where gradients are averaged over ranks, 1 where summed.
    """

    module: ObjectiveModule
    world: World
    loss_factor: float

    def accumulate(self, batches: Sequence[Packed], scale: Mapping[str, float]) -> LossSums:
        """Forward and backward of every micro-batch of one update; empty ones run too. Call `step` after it.

        Every rank passes the same number of micro-batches, at least one.

        Returns:
            {term: float64 scalar on this rank's device}, unweighted sums over this rank's micro-batches, detached.
        """
        self.module.train()
        self._open_window()
        sums: LossSums = {}
        for index, batch in enumerate(batches):
            terms = self._forward_backward(batch.to(self.world.device), scale, last=index == len(batches) - 1)
            _add(sums, terms)
        return sums

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Packed]) -> LossSums:
        """Sums of every term over this rank's `batches`, without dropout and without gradients; collective."""
        scale = dict.fromkeys(self.module.objective.weights, 1.0)
        self.module.eval()
        sums: LossSums = {}
        for batch in batches:
            _add(sums, self._forward(batch.to(self.world.device), scale))
        self.module.train()
        return sums

    @abstractmethod
    def step(self, lr: float) -> StepResult:
        """Clips the accumulated gradient, applies one update with learning rate `lr` unless a gradient is not
        finite, and clears the gradients; collective."""

    @abstractmethod
    def gathered(self) -> AbstractContextManager[None]:
        """Inside, every weight of `module` is whole on every rank (ZeRO-3 shards them elsewhere); collective."""

    def save_state(self, folder: Path) -> None:
        """Writes this rank's part of weights, optimizer and loss-scale state into `folder`; collective."""
        engine_state.save(self, folder)

    def load_state(self, folder: Path) -> None:
        """Reads what `save_state` of any engine, ZeRO stage and number of ranks wrote; collective.

        Raises:
            CheckpointError: naming the first parameter that is missing, unexpected or of another shape.
        """
        engine_state.load(self, folder)

    def full_weights(self) -> dict[str, Tensor]:
        """{name in `module`: fp32 CPU tensor} of parameters (tied ones once) and persistent buffers, on rank 0.

        Other ranks get an empty dict; collective.
        """
        weights = {name: self.read(name)["param"] for name in self.parameters()}
        weights |= {name: buffer.float().cpu() for name, buffer in self.buffers().items()}
        return weights if self.world.rank == 0 else {}

    # ------------------------------------------------- state, by parameter name

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of `module` by name; a tied one once, under its first name."""
        return dict(self.module.named_parameters())

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers of `module` by name."""
        weights = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        state = self.module.state_dict(keep_vars=True)
        return {name: value.detach() for name, value in state.items() if name not in weights}

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The full shape of every parameter."""

    @abstractmethod
    def read(self, name: str) -> dict[str, Tensor]:
        """{"param", "exp_avg", "exp_avg_sq"}: the full master tensors of a parameter, on the CPU; collective."""

    @abstractmethod
    def write(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Sets some or all of what `read` returns; takes effect for the forward with `refresh`."""

    @abstractmethod
    def refresh(self) -> None:
        """Copies the master weights into the weights of the forward; collective."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Updates the optimizer has counted (its bias correction); the same for every parameter."""

    @updates.setter
    @abstractmethod
    def updates(self, count: int) -> None: ...

    def loss_scale_state(self) -> dict[str, float] | None:
        """State of the dynamic loss scale; None where the precision has none."""
        return None

    def restore_loss_scale(self, state: Mapping[str, float]) -> None:  # noqa: B027 - most precisions have none
        """Sets what `loss_scale_state` returned."""

    # ---------------------------------------------------------- implementation

    def _open_window(self) -> None:  # noqa: B027 - most engines have nothing to prepare
        """Called before the first micro-batch of an update."""

    @abstractmethod
    def _forward(self, batch: Any, scale: Mapping[str, float]) -> LossSums: ...

    @abstractmethod
    def _forward_backward(self, batch: Any, scale: Mapping[str, float], last: bool) -> LossSums: ...


def build(
    config: EngineConfig,
    optim: OptimConfig,
    module: ObjectiveModule,
    world: World,
    user: Mapping[str, Any] | None = None,
) -> Engine:
    """Moves `module` to the device, gives every rank the weights of rank 0, and wraps it in the configured engine.

    Args:
        user: a DeepSpeed configuration of the user's own (`--deepspeed_config`), merged into the derived one.

    Raises:
        ConfigError: a combination that does not work, or a `user` key that conflicts with the configuration.
    """
    _check(config, world)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            raise ConfigError(f"parameter `{name}` must be trainable: an engine updates every parameter")
    module.to(world.device)
    if world.size > 1:
        for value in module.state_dict().values():
            dist.broadcast(value, src=0)
    if config.kind == "local":
        from pretrain.engine_local import LocalEngine

        return LocalEngine(config, optim, module, world)
    # deepspeed takes seconds to import, and plain-torch runs must work without it
    from pretrain.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, optim, module, world, user or {})


def clip(parameters: Sequence[Tensor], limit: float) -> float:
    """Scales the gradients so that their global norm is at most `limit` (0: any); returns the norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit > 0:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


@contextmanager
def nothing_to_gather() -> Iterator[None]:
    """`gathered` of engines that keep every weight whole."""
    yield


def _check(config: EngineConfig, world: World) -> None:
    stage, local = config.zero_stage, config.kind == "local"
    if config.precision == "fp16" and world.device.type == "cpu":
        raise ConfigError("`engine.precision` must be fp32 or bf16 on a CPU, got fp16")
    if config.precision == "fp16" and local:
        raise ConfigError("`engine.precision` fp16 needs `engine.kind` deepspeed, got local")
    if config.precision != "fp32" and not local and stage == 0:
        # without ZeRO deepspeed accumulates gradients in the low precision
        raise ConfigError(f"`engine.zero_stage` must be at least 1 with `engine.precision` {config.precision}, got 0")
    if config.offload != "none" and local:
        raise ConfigError(f"`engine.offload` {config.offload} needs `engine.kind` deepspeed, got local")
    if config.offload == "optimizer" and stage == 0:
        raise ConfigError("`engine.offload` optimizer needs `engine.zero_stage` of at least 1, got 0")
    if config.offload == "all" and stage != 3:
        raise ConfigError(f"`engine.offload` all needs `engine.zero_stage` 3, got {stage}")


def _add(sums: LossSums, terms: Mapping[str, Tensor]) -> None:
    for name, value in terms.items():
        value = value.detach().double()
        sums[name] = sums[name] + value if name in sums else value

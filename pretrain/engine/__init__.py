"""The engine: the one place that runs forward, backward and the update, whatever computes them underneath.

Two implementations of `base.Engine`: plain torch (`local`) and ZeRO 0-3 (`deepspeed`). Their state on disk (`state`:
full fp32 tensors by parameter name) is the same, so that a run moves between them, between ZeRO stages, numbers of
ranks and degrees of tensor parallelism without a conversion.
"""

from collections.abc import Mapping
from typing import Any

from pretrain.config import EngineConfig, OptimConfig
from pretrain.distributed import World, broadcast, shared, together
from pretrain.engine.base import Engine, StepResult
from pretrain.engine.calls import CallGuard
from pretrain.engine.tensor_parallel import TensorParallel
from pretrain.engine.tensor_parallel import check as check_cut
from pretrain.errors import ConfigError
from pretrain.models.apex_norms import apex_layer_norm, take_apex_norms
from pretrain.objectives.base import ObjectiveModule
from pretrain.optim import apex_fused_adam

__all__ = ["Engine", "StepResult", "build"]


def build(
    config: EngineConfig,
    optim: OptimConfig,
    module: ObjectiveModule,
    world: World,
    user: Mapping[str, Any] | None = None,
) -> Engine:
    """Gives every rank the weights of rank 0, and wraps `module`, or its part of it, in the configured engine.

    The engine moves it to the device, after cutting it where it cuts: the whole need not fit there.

    Args:
        user: a DeepSpeed configuration of the user's own (`--deepspeed_config`), merged into the derived one.

    Raises:
        ConfigError: a combination that does not work, or a `user` key that conflicts with the configuration.
    """
    together(lambda: _check(config, optim, world, module))
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            raise shared(ConfigError(f"parameter `{name}` must be trainable: an engine updates every parameter"))
    if config.layer_norm == "apex":
        take_apex_norms(module.model)
    shared_by = TensorParallel(module, world) if world.tensor_parallel > 1 else None
    if shared_by is not None:
        shared_by.broadcast(module)
    elif world.size > 1:
        for value in module.state_dict().values():
            broadcast(value, 0)
    guard = CallGuard(module, world) if config.check_calls else None  # its hooks must come before the engine's
    engine: Engine
    if config.kind == "local":
        from pretrain.engine.local import LocalEngine

        engine = LocalEngine(config, optim, module, world, shared_by)
    else:  # deepspeed takes seconds to import, and plain-torch runs must work without it
        from pretrain.engine.deepspeed import DeepSpeedEngine

        engine = DeepSpeedEngine(config, optim, module, world, user or {}, shared_by)
    engine.guard = guard
    return engine


def _check(config: EngineConfig, optim: OptimConfig, world: World, module: ObjectiveModule) -> None:
    stage, local = config.zero_stage, config.kind == "local"
    if config.tensor_parallel != world.tensor_parallel:
        raise ConfigError(
            f"`engine.tensor_parallel` must be {world.tensor_parallel} here, got {config.tensor_parallel}"
        )
    if world.tensor_parallel > 1:
        check_cut(module.model.config, world.tensor_parallel)
    if config.layer_norm == "apex":
        apex_layer_norm()
        if world.device.type == "cpu":
            raise ConfigError("`engine.layer_norm` apex needs a GPU, got a CPU; take torch")
    if optim.kind == "apex_fused_adam":
        apex_fused_adam()
        if world.device.type == "cpu":
            raise ConfigError("`optim.kind` apex_fused_adam needs a GPU, got a CPU; take adamw")
        if not local and (stage == 3 or config.offload != "none"):
            # ZeRO-3 steps a part of a group at a time, for each of which apex would count an update
            raise ConfigError(
                "`optim.kind` apex_fused_adam needs `engine.zero_stage` 0 to 2 and `engine.offload` none, "
                f"got {stage} and {config.offload}; take adamw"
            )
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

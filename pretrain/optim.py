"""AdamW, which parameters it decays, and the learning rate of every update."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import nvidia_apex
from pretrain.config import OptimConfig
from pretrain.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters of `module` into a decayed and an undecayed group, in module order.

    Biases, LayerNorm weights and anything else with fewer than two dimensions, and position embeddings are
    not decayed. A tied weight appears once. An empty group is left out.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or "position" in name
            (undecayed if spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of every engine. Its learning rate is 0 until an engine's step sets one.

    ZeRO-3 takes a trial step with zero gradients when it is built: with a rate above 0 that would decay the weights.

    Raises:
        ConfigError: `config.kind` is apex's, and apex is not there or was built without CUDA.
    """
    if config.kind == "apex_fused_adam":
        try:
            made: torch.optim.Optimizer = apex_fused_adam()(
                groups, lr=0.0, betas=config.betas, eps=config.eps, adam_w_mode=True
            )
        except (RuntimeError, ImportError) as error:
            raise ConfigError(
                f"`optim.kind` apex_fused_adam needs an apex built with its CUDA parts: {error}"
            ) from None
        return made
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def apex_fused_adam() -> Any:
    """The class `FusedAdam` of NVIDIA's apex; raises ConfigError where there is none."""
    return nvidia_apex.part("optimizers.FusedAdam", "`optim.kind` apex_fused_adam", "adamw")


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of the update that follows `step` applied ones (0 for the first of the run).

    Linear warm-up to `lr` over `warmup` updates, then
    `constant`: lr; `inverse_sqrt`: lr * sqrt(w / (w + updates since warm-up)), w = max(warmup, 1), at least end_lr;
    `polynomial`: end_lr + (lr - end_lr) * remaining**power; `cosine`: half a cosine from lr to end_lr; remaining falls
    linearly from 1 right after the warm-up to 0 after `total_steps` and stays there.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    since = step - config.warmup
    done = min(1.0, since / max(1, total_steps - config.warmup))
    span = config.lr - config.end_lr
    if config.schedule == "inverse_sqrt":
        width = max(config.warmup, 1)
        return max(config.lr * math.sqrt(width / (width + since)), config.end_lr)
    if config.schedule == "polynomial":
        return config.end_lr + span * (1.0 - done) ** config.power
    if config.schedule == "cosine":
        return config.end_lr + span * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr


def create_state(adam: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Creates the zero state that `adam` would create in its first step, so that it can be saved and set before."""
    for parameter in parameters:
        adam.state[parameter] = {name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS}
        if isinstance(adam, torch.optim.AdamW):
            adam.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    set_updates(adam, 0)


def updates(adam: torch.optim.Optimizer) -> int:
    """Updates that `adam` has counted for its bias correction: torch's with every weight, apex's with every group."""
    if isinstance(adam, torch.optim.AdamW):
        return int(next(iter(adam.state.values()))["step"])
    return int(adam.param_groups[0]["step"])


def set_updates(adam: torch.optim.Optimizer, count: int) -> None:
    """Sets what `updates` returns."""
    if isinstance(adam, torch.optim.AdamW):
        for state in adam.state.values():
            state["step"].fill_(count)
        return
    for group in adam.param_groups:
        group["step"] = count

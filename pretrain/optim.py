"""AdamW, which parameters it decays, and the learning rate of every update."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import OptimConfig

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


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of every engine. Its learning rate is 0 until an engine's step sets one.

    ZeRO-3 takes a trial step with zero gradients when it is built: with a rate above 0 that would decay the weights.
    """
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


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


def create_state(adam: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Creates the zero state that `adam` would create in its first step, so that it can be saved and set before."""
    for parameter in parameters:
        adam.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }

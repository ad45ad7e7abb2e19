"""Do two ways of decoding pull the shared weights the same way? The cosine of the gradients of AR and NAR.

1: one pulls where the other does; 0: they do not care; below: what one learns the other forgets.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.config import EngineConfig
from pretrain.engine import Engine
from pretrain.errors import ConfigError
from pretrain.loop import StepReport
from pretrain.watch.tensorboard import TensorBoard

TERMS = ("ar", "nar")


class GradientCosine:
    """Hook that writes the cosine over all weights, on a fixed batch without dropout, every `every` updates.

    Training does not notice: the gradients never meet those that accumulate, and no random number is drawn. It takes
    two forwards and backwards of the batch and room for two gradients on the one rank that has a board.
    """

    def __init__(self, engine: Engine, batch: Any, every: int, board: TensorBoard | None) -> None:
        self.engine, self.batch, self.every, self.board = engine, batch, every, board

    def after_step(self, report: StepReport) -> None:
        if self.board is None or not report.due(self.every):
            return
        value = self.measure(report.loss_scale or 1.0)
        if math.isfinite(value):
            self.board.scalars(report.step, {f"train/cosine_{'_'.join(TERMS)}": value})

    def measure(self, loss_scale: float = 1.0) -> float:
        """cos(gradient of the mean AR loss, gradient of the mean NAR loss); NaN where one of them is zero.

        loss_scale: keeps the gradients of fp16 weights from vanishing; the cosine does not depend on it.
        """
        module = self.engine.module
        module.eval()
        try:
            one, other = (self._gradient(term, loss_scale) for term in TERMS)
        finally:
            module.train()
        pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True)]
        dot = sum(float((a * b).sum()) for a, b in pairs)
        square = sum(float(a.square().sum()) for a, _ in pairs) * sum(float(b.square().sum()) for _, b in pairs)
        return dot / math.sqrt(square) if square > 0 else math.nan

    def _gradient(self, term: str, loss_scale: float) -> Sequence[Tensor]:
        objective, parameters = self.engine.module.objective, list(self.engine.module.parameters())
        count = max(1, objective.counts(self.batch)[term])
        scale = {name: loss_scale / count if name == term else 0.0 for name in objective.weights}
        batch = self.batch.to(self.engine.world.device)
        total, _ = objective.losses(self.engine.module.model, batch, scale)
        return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)


def check(every: int, engine: EngineConfig, objective: Any) -> None:
    """Raises ConfigError where the cosine is wanted and cannot be had."""
    if not every:
        return
    if engine.kind == "deepspeed" and engine.zero_stage == 3:
        raise ConfigError("`train.cosine_every` must be 0 with `engine.zero_stage` 3, which keeps no whole gradient")
    if engine.tensor_parallel > 1:
        raise ConfigError("`train.cosine_every` must be 0 with `engine.tensor_parallel` above 1, which cuts gradients")
    if not set(TERMS) <= set(objective.weights):
        terms = ", ".join(objective.weights)
        raise ConfigError(f"`train.cosine_every` must be 0 without the terms ar and nar, the objective has {terms}")

"""A model small enough to train on every engine in a second: tied head, dropout, a weight that only some windows touch.

n rows, V vocabulary, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import EngineConfig, OptimConfig
from pretrain.objectives.base import ObjectiveModule

OPTIM = OptimConfig(lr=0.01, clip=0.5, weight_decay=0.1)


@dataclass(frozen=True)
class ToyBatch:
    """ids_n: int64 [n]; every id predicts its successor in the vocabulary. `rare`: the loss reaches `model.rare`."""

    ids_n: Tensor
    rare: bool

    @property
    def n_samples(self) -> int:
        return len(self.ids_n)

    n_tokens = n_samples

    def to(self, device: torch.device) -> "ToyBatch":
        return ToyBatch(self.ids_n.to(device), self.rare)


class ToyModel(nn.Module):
    """7 x 5 embedding tied with the head: 35 values do not divide by 2 ranks."""

    def __init__(self, dropout: float, width: int = 5) -> None:
        super().__init__()
        self.shared = nn.Embedding(7, width)
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.rare = nn.Linear(width, 3, bias=False)
        self.head = nn.Linear(width, 7)
        self.head.weight = self.shared.weight
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("constant_V", torch.linspace(0.0, 1.0, 7))

    def forward(self, ids_n: Tensor, rare: bool) -> Tensor:
        h_nD = self.norm(self.shared(ids_n))
        h_nD = h_nD + self.dropout(torch.tanh(self.inner(h_nD)))
        rare_n1 = self.rare(h_nD).sum(-1, keepdim=True)  # computed always: ranks must call the same modules
        logits_nV = self.head(h_nD) + self.constant_V
        return logits_nV * (1 + rare_n1) if rare else logits_nV


class ToyObjective:
    """Cross-entropy over the rows and a penalty on the logits of the even ones."""

    weights: Mapping[str, float] = {"ce": 1.0, "penalty": 0.1}

    def corrupt(self, tokens: Any, sentences: Any, rng: Any) -> Any:
        raise NotImplementedError

    def collate(self, examples: Sequence[Any]) -> ToyBatch:
        raise NotImplementedError

    def counts(self, batch: ToyBatch) -> dict[str, int]:
        return {"ce": len(batch.ids_n), "penalty": int((batch.ids_n % 2 == 0).sum())}

    def losses(self, model: nn.Module, batch: ToyBatch, scale: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        logits_nV = model(batch.ids_n, batch.rare).float()
        even_n = (batch.ids_n % 2 == 0).float()
        terms = {
            "ce": F.cross_entropy(logits_nV, (batch.ids_n + 1) % 7, reduction="sum"),
            "penalty": (logits_nV.square().sum(-1) * even_n).sum(),
        }
        total = sum(scale[name] * value for name, value in terms.items())
        return total, {name: value.detach() for name, value in terms.items()}


def toy_module(dropout: float = 0.0, seed: int = 0, width: int = 5) -> ObjectiveModule:
    torch.manual_seed(seed)
    return ObjectiveModule(ToyModel(dropout, width), ToyObjective())


def toy_window(step: int) -> list[ToyBatch]:
    """The micro-batches of a step: of uneven sizes, the last one empty, number and rareness depend on the step."""
    rng = np.random.default_rng(step)
    sizes = [*rng.integers(1, 9, size=(5, 1, 3)[step % 3]), 0]
    return [ToyBatch(torch.from_numpy(rng.integers(0, 7, size=size)), step % 4 == 0) for size in sizes]


def toy_train(engine: Any, steps: range, rate: float = 0.01, poison: tuple[int, int] = (-1, -1)) -> list[Any]:
    """Trains with each window dealt to the ranks; `poison` = (step, rank) gets one NaN scale. Returns step results."""
    results = []
    for step in steps:
        window = toy_window(step)
        counts = [engine.module.objective.counts(batch) for batch in window]
        scale = {
            name: weight * engine.loss_factor / sum(count[name] for count in counts)
            for name, weight in engine.module.objective.weights.items()
        }
        if poison == (step, engine.world.rank):
            scale["penalty"] = float("nan")
        mine = window[engine.world.rank :: engine.world.size]
        sums = engine.accumulate(mine, scale)
        result = engine.step(rate)
        results.append((result.grad_norm, result.applied, {name: float(value) for name, value in sums.items()}))
    return results


def toy_engine(
    world: Any, kind: str, stage: int = 0, precision: str = "fp32", dropout: float = 0.0, **more: Any
) -> Any:
    from pretrain.engine import build

    config = EngineConfig(kind=kind, zero_stage=stage, precision=precision, offload=more.pop("offload", "none"))  # type: ignore[arg-type]
    return build(config, OPTIM, toy_module(dropout, **more), world)

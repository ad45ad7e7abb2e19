"""What an objective is: it corrupts in the worker, packs a batch, counts, and returns sums. It never divides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import merge
from pretrain.models.encoder_decoder import EncoderDecoder
from pretrain.models.patterns import ArLayout

LossSums = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """One sample after corruption, still on the numpy side.

    source: int64 [S], encoder input with its BOS and EOS.
    target: int64 [N+2], the clean text with its BOS and EOS.
    masked: int64 [b], increasing indices into `target` that the NAR and AUX patterns hide; never BOS or EOS.
    """

    source: np.ndarray
    target: np.ndarray
    masked: np.ndarray


@dataclass(frozen=True)
class Preview:
    """Token ids of one sample: encoder input, clean target, and per mode the target with predictions filled in.

    places: per mode, the indices into `target` that were predicted.
    """

    source: list[int]
    target: list[int]
    predicted: dict[str, list[int]]
    places: dict[str, list[int]]


def from_preset(values: Any, presets: Mapping[str, Mapping[str, Any]]) -> Any:
    """Options over those of the preset that they name, `paper` where they name none; sections are merged."""
    return merge(presets.get(str(values.get("preset", "paper")), {}), values) if isinstance(values, dict) else values


class Packed(Protocol):
    """A collated micro-batch: tensors and masks for one forward; immutable, picklable, movable."""

    n_samples: int
    n_tokens: int

    def to(self, device: torch.device) -> "Packed": ...


class Objective(Protocol):
    """One training objective; plain object without parameters.

    weights: {term: weight}, every term the objective can return.
    layout: how its AR pattern starts and positions its rows.
    modes: ways of writing that a model trained with it has learned, of `ar`, `nar` and `causal`.
    """

    weights: Mapping[str, float]
    layout: ArLayout
    modes: Sequence[str]

    def corrupt(self, tokens: np.ndarray, sentences: np.ndarray, rng: np.random.Generator) -> Example:
        """A text made harder; a pure function of its arguments that runs in a worker.

        tokens: int [N], without special ids. sentences: int [.], where each sentence begins; the first at 0.
        """
        ...

    def corrupt_pair(self, source: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> Example:
        """The same for a given pair (fine-tuning): the source stays whole. Both int [.] with BOS and EOS."""
        ...

    def collate(self, examples: Sequence[Example]) -> Any:
        """Packs rows and builds every mask. `examples` may be empty."""
        ...

    def counts(self, batch: Any) -> dict[str, int]:
        """{term: number of things its sum runs over}, known without a forward."""
        ...

    def losses(self, model: EncoderDecoder, batch: Any, scale: Mapping[str, float]) -> tuple[Tensor, LossSums]:
        """(differentiable sum of scale[term] * sum[term], detached unweighted sums per term)."""
        ...

    def preview(self, model: EncoderDecoder, batch: Any, limit: int) -> list[Preview]:
        """One-step predictions of the first `limit` samples, for people to read."""
        ...


class ObjectiveModule(nn.Module):
    """Model and objective as one module, so that an engine's hooks see a single forward.

    ZeRO-3 gathers parameters when the module that owns them runs; everything that touches a weight
    therefore happens inside this forward.
    """

    def __init__(self, model: EncoderDecoder, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Any, scale: Mapping[str, float]) -> tuple[Tensor, LossSums]:
        return self.objective.losses(self.model, batch, scale)

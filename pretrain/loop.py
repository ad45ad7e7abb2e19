"""The training loop. It knows windows of batches, an engine and hooks; nothing of data sets, files or objectives.

One update: read the window, add its counts over all ranks once, turn them into the factor of each term, run
forward and backward, check that every rank saw finite losses, step, tell the hooks. Because the factors come from
global counts, the gradient does not depend on how the window was cut into ranks and micro-batches. What a bad update
leads to is decided by a guard; it leaves no trace in weights, moments or generators.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch

from pretrain import blame, rng
from pretrain.distributed import agree, sum_counts
from pretrain.engine import Engine, StepResult
from pretrain.errors import CheckpointError, NonFiniteError, ParlanceError

# fp16 halves its loss scale at each overflow; at 1 there is nothing left to halve.
SMALLEST_LOSS_SCALE = 1.0

# {name: number of a batch}
Facts = Mapping[str, Callable[[Any], int]]
NO_FACTS: Facts = MappingProxyType({})


@dataclass(frozen=True)
class Progress:
    """Where a run is; all of a resume besides weights and generators.

    step: updates done. position: the next sample of the global order. samples, tokens: seen so far, over all ranks.
    """

    step: int = 0
    position: int = 0
    samples: int = 0
    tokens: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Progress":
        found: dict[str, int] = {}
        for name in cls.__dataclass_fields__:
            value = values.get(name)
            if type(value) is not int or not 0 <= value < 2**63:
                raise CheckpointError(f"progress of a checkpoint: `{name}` must be an integer, got {value!r:.80}")
            found[name] = value
        return cls(**found)


@dataclass(frozen=True)
class StepReport:
    """What one update was, the same on every rank but for the three times.

    losses: {term: global mean} of the terms that occurred. weights: {term: factor}. counts: {term: global count}.
    grad_norm: before clipping. applied: False where fp16 overflowed and the update was skipped.
    samples, tokens: of this update over all ranks. seconds, wait_seconds, compute_seconds: of this rank; the second
    for data alone, the third for forward and backward.
    facts: sums over all batches of the update, under the names of `fit`'s `facts`.
    """

    progress: Progress
    last: bool
    losses: Mapping[str, float]
    weights: Mapping[str, float]
    counts: Mapping[str, int]
    lr: float
    grad_norm: float
    applied: bool
    loss_scale: float | None
    samples: int
    tokens: int
    seconds: float
    wait_seconds: float
    compute_seconds: float = 0.0
    facts: Mapping[str, int] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def total(self) -> float:
        """The number that training makes smaller."""
        return weighted(self.losses, self.weights)

    def to_json(self) -> str:
        """For `from_json`; a norm may be infinite."""
        return json.dumps({**vars(self), "progress": self.progress.to_json()}, default=dict)

    @classmethod
    def from_json(cls, text: Any) -> "StepReport":
        """Raises CheckpointError where `text` is not what `to_json` gave."""
        try:
            values = json.loads(text)
            return cls(**{**values, "progress": Progress.from_json(values["progress"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"`unfinished` of a checkpoint is damaged: {type(error).__name__}") from None

    def due(self, every: int) -> bool:
        """True at each multiple of `every` updates and at the last one; never for 0."""
        return every > 0 and (self.step % every == 0 or self.last)


class Hook(Protocol):
    """Periodic work. Every rank calls the same hooks in the same order, so a hook may hold a collective."""

    def after_step(self, report: StepReport) -> None: ...


class Window(Protocol):
    """This rank's micro-batches of one update; `count` samples of the global order from `first` on, over all ranks."""

    @property
    def first(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def batches(self) -> Sequence[Any]: ...


class Guard:
    """What becomes of a bad update. This one stops training; every rank asks it the same."""

    def check(self, step: int, total: float) -> None:
        """Raises NonFiniteError where the finite loss `total` of the update `step` is no good either."""

    def pardon(self, error: NonFiniteError, window: Window) -> None:
        """Raises `error`, or returns, and training goes on behind the samples of `window`."""
        raise error


def fit(
    engine: Engine,
    windows: Iterator[Window],
    learning_rate: Callable[[int], float],
    steps: int,
    progress: Progress,
    hooks: Sequence[Hook],
    facts: Facts = NO_FACTS,
    guard: Guard | None = None,
) -> Progress:
    """Trains from `progress` until `steps` updates are done and returns where it stands then.

    Args:
        windows: endless, the first one starting at `progress.position` or behind it.
        learning_rate: of the update that follows `step` done ones.
        hooks: run after every update, in this order; one that stops training raises.
        facts: {name: number of a batch}, added up for the hooks.
        guard: decides about updates that are not finite.

    Raises:
        NonFiniteError: on every rank, before the update, if a loss or (outside fp16) the gradient is not finite, and
            the guard does not pardon it.
        ParlanceError: what one rank met when it read its window, on every rank.
    """
    objective, copies = engine.module.objective, engine.world.tensor_parallel
    guard = guard or Guard()
    while progress.step < steps:
        started = time.perf_counter()
        window: Window | None = None
        error: ParlanceError | None = None
        # A reader draws from torch's generator when it starts, so a resumed run would have other dropout than this one.
        with torch.random.fork_rng(devices=[]):
            try:
                window = next(windows)
            except ParlanceError as problem:  # of this rank alone; the others hear of it with the counts
                error = problem
        waited = time.perf_counter() - started
        step, lr = progress.step + 1, learning_rate(progress.step)

        counts, extent = global_counts(objective, window.batches if window else (), error, facts, copies)
        assert window is not None
        try:
            losses, result, computed = update(engine, window.batches, counts, step, lr, guard)
        except NonFiniteError as problem:
            guard.pardon(problem, window)
            continue

        progress = Progress(
            step, window.first + window.count, progress.samples + window.count, progress.tokens + extent["tokens"]
        )
        report = StepReport(
            progress=progress,
            last=step == steps,
            losses=losses,
            weights=objective.weights,
            counts=counts,
            lr=lr,
            grad_norm=result.grad_norm,
            applied=result.applied,
            loss_scale=result.loss_scale,
            samples=window.count,
            tokens=extent["tokens"],
            seconds=time.perf_counter() - started,
            wait_seconds=waited,
            compute_seconds=computed,
            facts={name: extent[name] for name in facts},
        )
        for hook in hooks:
            hook.after_step(report)
    return progress


def update(
    engine: Engine, batches: Sequence[Any], counts: Mapping[str, int], step: int, lr: float, guard: Guard
) -> tuple[dict[str, float], StepResult, float]:
    """(global mean of each term that occurred, what the engine says, seconds of forward and backward on this rank).

    Raises:
        NonFiniteError: on every rank; weights, moments and torch's generators are then as they were.
    """
    weights = engine.module.objective.weights
    scale = {
        term: weight * engine.loss_factor / counts[term] if counts[term] else 0.0 for term, weight in weights.items()
    }
    with rng.put_back_on(NonFiniteError):
        started = time.perf_counter()
        # as numbers, so that the device has done the work that this rank is measured by
        sums = {term: float(value) for term, value in engine.accumulate(batches, scale).items()}
        computed = time.perf_counter() - started
        losses = global_means(sums, counts, engine.world.tensor_parallel)
        try:
            blame.check_losses(engine, losses, sums, step)
            guard.check(step, weighted(losses, weights))
        except NonFiniteError:
            engine.drop()
            raise
        result = engine.step(lr)
        if not result.applied and (result.loss_scale is None or result.loss_scale <= SMALLEST_LOSS_SCALE):
            raise blame.bad_gradient(engine, batches, scale, losses, result.grad_norm, step)
    return losses, result, computed


def global_counts(
    objective: Any,
    batches: Sequence[Any],
    error: ParlanceError | None = None,
    facts: Facts = NO_FACTS,
    copies: int = 1,
) -> tuple[dict[str, int], dict[str, int]]:
    """({term: count}, {"tokens": target tokens, fact: sum}) of the batches of all ranks; one collective.

    error: why this rank has no batches, which is then raised on every rank. copies: ranks that have the same ones.
    """
    mine = {f"term/{term}": 0 for term in objective.weights} | {"errors": int(error is not None)}
    extent = {"tokens": lambda batch: batch.n_tokens, **facts}
    mine |= {name: sum(fact(batch) for batch in batches) for name, fact in extent.items()}
    for batch in batches:
        for term, count in objective.counts(batch).items():
            mine[f"term/{term}"] += count
    everywhere = sum_counts(mine)
    if everywhere["errors"]:
        agree(error)
    counts = {term: int(everywhere[f"term/{term}"]) // copies for term in objective.weights}
    return counts, {name: int(everywhere[name]) // copies for name in extent}


def global_means(sums: Mapping[str, Any], counts: Mapping[str, int], copies: int = 1) -> dict[str, float]:
    """{term: mean} over all ranks of the terms that occurred; one collective, so every rank sees the same NaN.

    copies: ranks that have the same sums.
    """
    everywhere = sum_counts({term: float(sums[term]) for term in counts})
    return {term: everywhere[term] / (copies * count) for term, count in counts.items() if count}


def weighted(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Sum of every term's mean times its weight."""
    return sum(weights[term] * value for term, value in losses.items())

"""The loop on an objective small enough to work out by hand: mean of (w * x - y)^2, cut up in several ways."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pretrain.config import EngineConfig, OptimConfig
from pretrain.distributed import World
from pretrain.engine import StepResult, build
from pretrain.errors import CheckpointError, NonFiniteError
from pretrain.loop import Progress, StepReport, fit
from pretrain.objectives import ObjectiveModule
from tests.distributed_helper import run_ranks

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@dataclass(frozen=True)
class Points:
    """x [n], y [n]."""

    x: torch.Tensor
    y: torch.Tensor

    @property
    def n_samples(self):
        return len(self.x)

    @property
    def n_tokens(self):
        return 2 * len(self.x)

    def to(self, device):
        return replace(self, x=self.x.to(device), y=self.y.to(device))


class Squares:
    """Terms: `near` over all points, `far` over those with x > 1."""

    weights = {"near": 1.0, "far": 0.5}

    def counts(self, batch):
        return {"near": batch.n_samples, "far": int((batch.x > 1).sum())}

    def losses(self, model, batch, scale):
        square = (model.weight * batch.x - batch.y) ** 2
        sums = {"near": square.sum(), "far": square[batch.x > 1].sum()}
        total = sum(scale[term] * value for term, value in sums.items())
        return total, {term: value.detach() for term, value in sums.items()}


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))


@dataclass(frozen=True)
class Cut:
    first: int
    count: int
    batches: list


def engine_of(clip=0.0):
    module = ObjectiveModule(Slope(), Squares())
    return build(EngineConfig(kind="local"), OptimConfig(clip=clip, weight_decay=0.0), module, ALONE)


def cut(x, y, sizes):
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    edges = [0, *itertools.accumulate(sizes)]
    return [Points(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]


def repeat(batches):
    count = sum(batch.n_samples for batch in batches)
    return (Cut(index * count, count, batches) for index in itertools.count())


class Recorder:
    def __init__(self):
        self.reports: list[StepReport] = []

    def after_step(self, report):
        self.reports.append(report)


def train(engine, windows, steps, progress=None, lr=lambda step: 0.1):
    recorder = Recorder()
    return fit(engine, windows, lr, steps, progress or Progress(), [recorder]), recorder.reports


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) == 6 or sum(sizes) == 4))
def test_cutting_into_micro_batches_changes_nothing(sizes):
    x, y = [0.5, 2.0, 1.5, -1.0, 0.1, 3.0][: sum(sizes)], [1.0, 2.0, -1.0, 0.5, 0.0, 1.0][: sum(sizes)]
    _, whole = train(engine_of(), repeat(cut(x, y, [len(x)])), 3)
    _, parts = train(engine_of(), repeat(cut(x, y, sizes)), 3)
    for one, other in zip(whole, parts, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-12)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-12)


def test_losses_and_gradient_are_global_means():
    x, y = [0.5, 2.0, 4.0], [0.0, 1.0, 2.0]
    progress, reports = train(engine_of(), repeat(cut(x, y, [2, 1])), 1)
    near, far = (0.25 + 1 + 4) / 3, (1 + 4) / 2
    gradient = 2 * (0.25 + 2 + 8) / 3 + 0.5 * 2 * (2 + 8) / 2
    report = reports[0]
    assert report.losses == pytest.approx({"near": near, "far": far})
    assert report.total == pytest.approx(near + 0.5 * far)
    assert report.grad_norm == pytest.approx(gradient)
    assert (report.samples, report.tokens, report.counts) == (3, 6, {"near": 3, "far": 2})
    assert progress == Progress(step=1, position=3, samples=3, tokens=6)
    assert report.last and report.due(1000) and not report.due(0)


def test_a_term_that_does_not_occur_is_not_reported_and_pulls_nothing():
    _, reports = train(engine_of(), repeat(cut([0.5], [0.0], [1])), 1)
    assert set(reports[0].losses) == {"near"}
    assert reports[0].grad_norm == pytest.approx(0.5)


def test_the_learning_rate_is_asked_for_the_number_of_done_updates():
    asked = []
    train(engine_of(), repeat(cut([1.0], [0.0], [1])), 3, lr=lambda step: asked.append(step) or 0.1)
    assert asked == [0, 1, 2]


def test_it_continues_where_progress_says():
    windows = repeat(cut([1.0], [0.0], [1]))
    progress, reports = train(engine_of(), windows, 5, Progress(3, 3, 3, 6))
    assert [report.step for report in reports] == [4, 5]
    assert progress.step == 5
    assert train(engine_of(), windows, 5, progress)[1] == []


def test_a_loss_that_is_not_finite_stops_before_the_update():
    engine, recorder = engine_of(), Recorder()
    good, bad = cut([2.0], [1.0], [1]), cut([2.0], [math.nan], [1])
    windows = iter([Cut(0, 1, good), Cut(1, 1, bad)])
    before = []
    recorder.after_step = lambda report: before.append(engine.module.model.weight.item())
    with pytest.raises(NonFiniteError, match=r"loss term `near` must be finite, was nan at step 2"):
        fit(engine, windows, lambda step: 0.1, 5, Progress(), [recorder])
    assert before == [engine.module.model.weight.item()]


def test_a_gradient_that_is_not_finite_stops_unless_the_loss_scale_moved(monkeypatch):
    engine = engine_of()
    monkeypatch.setattr(engine, "step", lambda lr: StepResult(math.inf, applied=False))
    with pytest.raises(NonFiniteError, match="gradient norm must be finite, was inf at step 1"):
        train(engine, repeat(cut([1.0], [0.0], [1])), 1)
    monkeypatch.setattr(engine, "step", lambda lr: StepResult(math.inf, applied=False, loss_scale=1024.0))
    _, reports = train(engine, repeat(cut([1.0], [0.0], [1])), 1)
    assert not reports[0].applied and reports[0].loss_scale == 1024.0


def test_progress_of_another_shape_is_a_checkpoint_error():
    assert Progress.from_json(Progress(1, 2, 3, 4).to_json()) == Progress(1, 2, 3, 4)
    whole = {"step": 1, "position": 0, "samples": 0, "tokens": 0}
    for bad in ({}, {"step": 1}, *({**whole, "step": wrong} for wrong in ("x", -1, 1.0, True, 2**63, None))):
        with pytest.raises(CheckpointError, match=r"`(step|position)` must be an integer"):
            Progress.from_json(bad)


def two_ranks(world):
    local = EngineConfig(kind="local")

    def fresh():
        return build(local, OptimConfig(clip=0.0, weight_decay=0.0), ObjectiveModule(Slope(), Squares()), world)

    x, y = [0.5, 2.0, 1.5, -1.0, 0.1, 3.0], [1.0, 2.0, -1.0, 0.5, 0.0, 1.0]
    mine = cut(x, y, [4, 2])[world.rank]
    windows = (Cut(6 * i, 6, [mine]) for i in itertools.count())
    _, reports = train(fresh(), windows, 3)
    poisoned = cut([1.0], [math.nan if world.rank else 0.0], [1])
    try:
        train(fresh(), iter([Cut(0, 2, poisoned)]), 1)
    except NonFiniteError as error:
        return [report.grad_norm for report in reports], str(error)
    return [report.grad_norm for report in reports], ""


def test_two_ranks_make_the_same_steps_and_stop_together():
    (norms, stopped), second = run_ranks(two_ranks, 2)
    assert second == (norms, stopped) and stopped.startswith("loss term `near`")
    _, alone = train(engine_of(), repeat(cut([0.5, 2.0, 1.5, -1.0, 0.1, 3.0], [1.0, 2.0, -1.0, 0.5, 0.0, 1.0], [6])), 3)
    assert norms == pytest.approx([r.grad_norm for r in alone], rel=1e-10)

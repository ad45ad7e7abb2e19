"""Updates that are not finite, or spikes: named, skipped, rewound; and in the end as if their samples had not been."""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pretrain.__main__ import main
from pretrain.config import TrainConfig
from pretrain.errors import LossSpike, NonFiniteError
from pretrain.faults import FEWEST, Policy
from pretrain.loop import Progress, fit
from pretrain.objectives.janus import Janus
from pretrain.runs import read_events
from tests.distributed_helper import run_ranks
from tests.pretrain.runs import make_data, training_curve, write_config
from tests.pretrain.test_loop import Cut, Recorder, cut, engine_of
from tests.pretrain.toy_engine import toy_engine, toy_window


def policy(**changes):
    events = []
    return Policy(TrainConfig(**changes), lambda event, **details: events.append((event, details))), events


def windows(*points):
    """One update a point: (x, y)."""
    return (Cut(7 * index, 7, cut([x], [y], [1])) for index, (x, y) in enumerate(points))


# Each kind of gradient that an engine keeps.
DROPPING = [
    ("local", 0, "bf16"), ("deepspeed", 0, "fp32"), ("deepspeed", 1, "fp32"), ("deepspeed", 1, "bf16"),
    ("deepspeed", 2, "bf16"), ("deepspeed", 3, "fp32"),
    ("deepspeed", 2, "fp32", "optimizer"), ("deepspeed", 3, "fp32", "optimizer"),
]  # fmt: skip
GOOD = [(0.5, 1.0), (2.0, 0.3), (1.5, -1.0), (3.0, 1.0)]


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("bad", [(1.0, math.nan), (1e200, 0.0)])
def test_skipped_samples_might_never_have_been(at, bad):
    guard, events = policy(on_nonfinite="skip")
    engine, calm, recorder = engine_of(), engine_of(), Recorder()
    torch.manual_seed(1)
    generator = torch.get_rng_state()
    poisoned = [*GOOD[:at], bad, *GOOD[at:]]
    progress = fit(engine, windows(*poisoned), lambda step: 0.1 / (1 + step), 4, Progress(), [recorder], guard=guard)
    fit(calm, windows(*GOOD), lambda step: 0.1 / (1 + step), 4, Progress(), [])
    assert engine.module.model.weight.item() == calm.module.model.weight.item()
    assert [report.step for report in recorder.reports] == [1, 2, 3, 4] and progress == Progress(4, 35, 28, 8)
    assert torch.equal(torch.get_rng_state(), generator)
    ((event, details),) = events
    assert event == "skip" and details["samples"] == [7 * at, 7] and f"at step {at + 1}" in details["message"]


def test_too_many_in_a_row_stop():
    guard, events = policy(on_nonfinite="skip", max_skips=2)
    bad = (1.0, math.nan)
    hooks = [guard]
    with pytest.raises(NonFiniteError, match=r"2 updates before it were skipped, `train\.max_skips`"):
        given = windows(bad, bad, GOOD[0], bad, bad, GOOD[1], bad, bad, bad)
        fit(engine_of(), given, lambda step: 0.1, 9, Progress(), hooks, guard=guard)
    assert len(events) == 6


def test_a_spike_is_many_times_the_median():
    guard, events = policy(on_nonfinite="skip", spike_factor=3.0)
    spiked = [*itertools.repeat((1.0, 3.0), FEWEST), (1.0, 50.0), (1.0, 3.0)]
    steps = FEWEST + 1
    fit(engine_of(), windows(*spiked), lambda step: 1e-4, steps, Progress(), [guard], guard=guard)
    ((_, details),) = events
    assert "must be at most 3 times its median of 16 updates (" in details["message"] and details["samples"][0] == 112
    stops, _ = policy(spike_factor=3.0)
    with pytest.raises(LossSpike, match=f"at step {steps}; not applied"):
        fit(engine_of(), windows(*spiked), lambda step: 1e-4, steps, Progress(), [stops], guard=stops)
    after, _ = policy(on_nonfinite="skip", spike_factor=3.0)
    after.restore(stops.to_json())
    assert after.recent == stops.recent and len(after.recent) == FEWEST, "a resume knows what is usual"


def drops(world):
    """Weights after six updates, with and without a seventh that is dropped in their midst."""
    found = {}
    for case in DROPPING:
        both = []
        for dropped in (False, True):
            kind, stage, precision, *offload = case
            engine = toy_engine(world, kind, stage, precision, offload=offload[0] if offload else "none")
            for step in range(6):
                for number in (9, step) if dropped and step == 3 else (step,):
                    window = toy_window(number)
                    counts = [engine.module.objective.counts(batch) for batch in window]
                    scale = {
                        name: weight * engine.loss_factor / sum(count[name] for count in counts)
                        for name, weight in engine.module.objective.weights.items()
                    }
                    engine.accumulate(window[world.rank :: world.size], scale)
                    if number == step:
                        assert engine.step(0.01).applied
                    else:
                        engine.drop()
            both.append({name: value.numpy() for name, value in engine.full_weights().items()} | {"n": engine.updates})
        found[str(case)] = both
    return found


@pytest.fixture(scope="module")
def dropped():
    return run_ranks(drops, 2, timeout=500.0)[0]


@pytest.mark.parametrize("case", DROPPING, ids=str)
def test_a_dropped_gradient_leaves_no_trace_in_any_engine(case, dropped):
    calm, other = dropped[str(case)]
    for name, value in calm.items():
        assert np.array_equal(value, other[name]), name


def blamed(world):
    """What is said of a term, and of a gradient, that is not finite on rank 1 alone."""
    said = []
    for x, y in ((1.0, math.nan), (1e154, 0.0)):
        mine = cut([x], [y], [1]) if world.rank else cut([1.0], [0.0], [1])
        engine = engine_of_world(world)
        try:
            fit(engine, iter([Cut(0, 2, mine)]), lambda step: 0.1, 1, Progress(), [])
        except NonFiniteError as error:
            said.append((str(error), error.samples))
    return said


def engine_of_world(world):
    from pretrain.config import EngineConfig, OptimConfig
    from pretrain.engine import build
    from pretrain.objectives import ObjectiveModule
    from tests.pretrain.test_loop import Slope, Squares

    class Steep(Squares):
        """Finite, with a gradient that is not."""

        def losses(self, model, batch, scale):
            total, sums = super().losses(model, batch, scale)
            if float(batch.x.max()) > 1e100:
                total = scale["near"] * (model.weight * 0).sqrt().sum()
                sums = dict.fromkeys(sums, torch.zeros(()))
            return total, sums

    config = OptimConfig(clip=0.0, weight_decay=0.0)
    return build(EngineConfig(kind="local"), config, ObjectiveModule(Slope(), Steep()), world)


def test_the_rank_and_the_term_are_named():
    (term, gradient), second = run_ranks(blamed, 2)
    assert second == [term, gradient]
    assert re.fullmatch(r"loss term `near` must be finite, was nan at step 1 on rank 1 \(\S+\); not applied", term[0])
    assert "gradient norm must be finite" in gradient[0]
    assert re.search(r" on rank 1 \(\S+\) of term `near`, weight `model.weight`; not applied", gradient[0]), gradient


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("text"), 150)


def final(run, step):
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {name: (folder / name).read_bytes() for name in ("state-rank0.safetensors", "rng-rank0.safetensors")}


def poison(monkeypatch, term, first, times=1 << 30):
    """`term` is not finite in the window that begins at `first`, so many times."""
    true, left = Janus.losses, SimpleNamespace(times=times)

    def poisoned(self, model, batch, scale):
        total, sums = true(self, model, batch, scale)
        if model.training and self.first == first and left.times:
            left.times -= 1
            return total * math.nan, {**sums, term: sums[term] * math.nan}
        return total, sums

    monkeypatch.setattr(Janus, "losses", poisoned)


@pytest.fixture
def seen(monkeypatch):
    """Objectives know the position of the update that they compute."""
    from pretrain import run

    true = run.Run._awaited

    def awaited(self, *arguments):
        for window in true(self, *arguments):
            self.engine.module.objective.first = window.first
            yield window

    monkeypatch.setattr(run.Run, "_awaited", awaited)


def without(monkeypatch, first):
    """Runs as if the data had no samples of the window at `first`."""
    from pretrain.data.stream import SampleStream

    true = SampleStream.windows

    def fewer(self, *arguments):
        for window in true(self, *arguments):
            if window.first != first:
                yield window

    monkeypatch.setattr(SampleStream, "windows", fewer)


@pytest.mark.parametrize("how", ["skip", "rewind"])
def test_a_run_that_went_past_bad_samples_equals_one_without_them(how, data, tmp_path, monkeypatch, seen, capsys):
    steps = ("train.steps=8", "train.save_every=3", "train.validate_every=4", f"train.on_nonfinite={how}")
    with monkeypatch.context() as patch:
        without(patch, 24)
        calm = write_config(tmp_path, data, "calm")
        assert main(["train", str(calm), "name=calm", *steps]) == 0
    with monkeypatch.context() as patch:
        poison(patch, "kl_nar_aux", 24)
        config = write_config(tmp_path, data)
        assert main(["train", str(config), *steps]) == 0
    run, other = tmp_path / "runs" / "tiny", tmp_path / "runs" / "calm"
    assert final(run, 8) == final(other, 8)
    assert training_curve(run) == training_curve(other)
    (event,) = (event for event in read_events(run) if event["event"] == how)
    assert event["samples"] == [24, 6] and "`kl_nar_aux` must be finite, was nan at step 5" in event["message"]
    assert ("going on from step 3" if how == "rewind" else "its samples are jumped over") in capsys.readouterr().err


def test_a_rewound_run_that_is_ended_goes_the_same_way(data, tmp_path, monkeypatch, seen):
    """The fault was of the moment: only the journal knows what was left out."""
    steps = ("train.steps=8", "train.save_every=3", "train.on_nonfinite=rewind")
    with monkeypatch.context() as patch:
        without(patch, 24)
        assert main(["train", str(write_config(tmp_path, data, "calm")), "name=calm", *steps]) == 0
    config = write_config(tmp_path, data)
    with monkeypatch.context() as patch:
        poison(patch, "ar", 24, times=1)
        patch.setattr("pretrain.run.AllRanks.after_step", ended_after(4))
        with pytest.raises(KeyboardInterrupt):
            main(["train", str(config), *steps])
    assert main(["train", str(config), *steps]) == 0
    assert final(tmp_path / "runs" / "tiny", 8) == final(tmp_path / "runs" / "calm", 8)


def ended_after(step):
    """Hooks that die at the second update of that number."""
    from pretrain.run import AllRanks

    true, seen = AllRanks.after_step, []

    def after_step(self, report):
        seen.append(report.step)
        if seen.count(step) == 2:
            raise KeyboardInterrupt
        true(self, report)

    return after_step


@pytest.mark.parametrize("what", ["param", "exp_avg"])
def test_weights_and_moments_that_are_not_finite_are_healed_by_going_back(what, data, tmp_path, monkeypatch, capsys):
    from pretrain.engine.local import LocalEngine

    true, count = LocalEngine.step, [0]

    def broken(self, lr):
        result = true(self, lr)
        count[0] += 1
        if count[0] == 5:
            name = next(iter(self.parameters()))
            self.write(name, {what: torch.full_like(self.read(name)[what], math.nan)})
        return result

    steps = ("train.steps=8", "train.save_every=3", "train.validate_every=0", "train.sample_every=0")
    assert main(["train", str(write_config(tmp_path, data, "calm")), "name=calm", *steps]) == 0
    for how, code in (("stop", 7), ("rewind", 0)):
        count[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(LocalEngine, "step", broken)
            given = [str(write_config(tmp_path, data)), f"name={how}", f"train.on_nonfinite={how}"]
            assert main(["train", *given, *steps]) == code
        said = capsys.readouterr().err
        weight = "weight `" in said and "is not finite, only an earlier checkpoint helps" in said
        assert weight or "is not finite: the state is not saved" in said, said
    events = read_events(tmp_path / "runs" / "rewind")
    assert "rewind" in [event["event"] for event in events]
    assert (tmp_path / "runs" / "stop" / "latest").read_text().strip() == "step-00000003"


def test_a_damaged_checkpoint_and_the_one_in_its_place_are_both_named(data, tmp_path, capsys):
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    assert main(["train", str(config)]) == 0
    whole = final(run, 6)
    damaged = run / "checkpoints" / "step-00000006" / "state-rank0.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    assert main(["train", str(config)]) == 0
    said = capsys.readouterr().err
    told = ["step-00000006 is damaged and not used: state-rank0.safetensors: sha256", "latest now names step-00000003"]
    assert all(line in said for line in (*told, "continuing at step 3: 3 of 6 updates to do"))
    resumed = [event for event in read_events(run) if event["event"] == "resume"][-1]
    assert (
        resumed["step"] == 3
        and [line.startswith(told[at]) for at, line in enumerate(resumed["repaired"])] == [True] * 2
    )
    assert final(run, 6) == whole

"""A slow rank is told once, with its host, until it is fast again."""

import pytest
import torch

from pretrain.distributed import World
from pretrain.watch import slow
from pretrain.watch.slow import SlowRanks
from tests.pretrain.test_hooks import report


@pytest.fixture
def ranks(monkeypatch):
    """A hook of rank 0 of three; `others` gives what the other two say of themselves."""
    told, others = [], [["b", 0.2, 0.0], ["c", 0.21, 0.0]]
    monkeypatch.setattr(slow, "exchange", lambda mine: [["a", *mine[1:]], *others])
    monkeypatch.setattr(slow, "RARELY", 10)
    hook = SlowRanks(World(0, 3, 0, torch.device("cpu")), 1, lambda *what: told.append(what))

    def run(first, seconds, wait=0.0):
        for step in range(first, first + slow.RECENT):
            hook.after_step(report(step, compute_seconds=seconds, wait_seconds=wait))
        return told

    return run, others


def test_it_is_told_once_and_again_when_it_was_fast_meanwhile(ranks):
    run, _ = ranks
    assert run(1, 0.2) == []
    assert run(51, 0.1, wait=0.25) == [(80, 0, "a", 0.35, 0.25, pytest.approx(0.205))], "half of the window, 1.5 times"
    run(101, 0.2)
    assert [what[0] for what in run(151, 0.5)] == [80, 180]


def test_others_are_told(ranks):
    run, others = ranks
    others[1] = ["c", 0.4, 0.1]
    assert run(1, 0.2) == [(10, 2, "c", 0.4, 0.1, pytest.approx(0.2))]


def test_milliseconds_apart_is_no_slowness(ranks):
    run, others = ranks
    others[:] = [["b", 0.001, 0.0], ["c", 0.008, 0.0]]
    assert run(1, 0.001) == []


def test_one_long_update_is_no_slowness(monkeypatch):
    told = []
    monkeypatch.setattr(slow, "exchange", lambda mine: [mine, ["b", 0.2, 0.0]])
    hook = SlowRanks(World(0, 2, 0, torch.device("cpu")), 1, lambda *what: told.append(what))
    for step in range(1, 101):
        hook.after_step(report(step, compute_seconds=30.0 if step % 10 == 3 else 0.2, wait_seconds=0.0))
    assert told == []

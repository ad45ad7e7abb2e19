"""Real kills of a run on two ranks, of the whole job or of one rank, while checkpoints are written in the background.

Never stuck, never a lost commit, and in the end not a bit is different.
"""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain.runs import read_events
from tests.e2e.lives import Forked, Launched, a_second_later, final_files, killed, newest
from tests.pretrain.runs import SMALL, make_data, training_curve

CONFIG = (
    SMALL
    + """\
engine: {{kind: {engine}, zero_stage: 2}}
train: {{steps: 100000, log_every: 1, validate_every: 7, validate_batches: 2, sample_every: 5, save_every: {every},
  async_save: {background}}}
"""
)
BOTH, FIRST, SECOND = (0, 1), (0,), (1,)
JOB, ONE = (BOTH,), (SECOND, FIRST)
Ends = list[tuple[str, tuple[int, ...], str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"), 150)


def check(folder: Path, data: Path, engine: str, every: int, ends: Ends, background: str = "true") -> None:
    """Kills a run at every one of `ends`, lets it finish, and compares it with one that was left alone."""
    configs = {}
    for name in ("killed", "calm"):
        configs[name] = folder / f"{name}.yaml"
        where = {"name": name, "runs": folder / "runs", "data": data}
        text = CONFIG.format(**where, engine=engine, every=every, background=background)
        configs[name].write_text(text)
    run, calm = folder / "runs" / "killed", folder / "runs" / "calm"
    for number, (moment, ranks, launcher) in enumerate(ends):
        arguments: tuple[Any, ...] = ("train", configs["killed"])
        log = folder / f"life-{number}.log"
        start = partial(Launched, log, launcher, *arguments) if launcher else partial(Forked, log, *arguments)
        a_second_later(run)
        killed(start, run, moment, ranks)

    end = newest(run) + 3
    a_second_later(run)
    for name in configs:
        life = Forked(folder / f"{name}.log", "train", configs[name], f"train.steps={end}")
        assert life.wait() == [0, 0], life.printed()[-4000:]
    assert final_files(run, end) == final_files(calm, end), "weights, moments, generators and progress, to the bit"
    curve = training_curve(run)
    assert curve == training_curve(calm), "each (tag, step) once, each with the value of the run left alone"
    assert [step for step, _ in curve["loss/total"]] == list(range(1, end + 1))
    assert (run / "latest").read_text().strip() == f"step-{end:08d}"
    assert not [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("step-")]
    assert read_events(run)[-1]["event"] == "finish"


def moments(seed: int, count: int, who: Sequence[tuple[int, ...]], launcher: str) -> Ends:
    """Half of them inside saves and deletions; each eighth life is started by a launcher."""
    draw = random.Random(seed)
    kinds = ("any", "save", "any", "deletion", "save", "progress")
    ends = [(draw.choice(kinds), who[number % len(who)], "") for number in range(count)]
    for number in range(2, count, 8):
        ends[number] = draw.choice(("any", "save", "progress")), ends[number][1], launcher
    return ends


@pytest.mark.fault("kill -9 of the whole job at random moments", trials=1)
@pytest.mark.fault("kill of one rank", trials=2)
def test_three_kills(data: Path, tmp_path: Path) -> None:
    check(tmp_path, data, "local", 2, [("save", BOTH, ""), ("progress", SECOND, ""), ("deletion", FIRST, "")])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault("kill -9 of the whole job at random moments", trials=50)
@pytest.mark.parametrize(
    ("seed", "engine", "launcher", "background"),
    [
        (11, "local", "torchrun", "true"),
        (12, "deepspeed", "deepspeed", "true"),
        (13, "local", "deepspeed", "false"),
        (14, "deepspeed", "torchrun", "true"),
    ],
)
def test_fifty_kills_of_the_job(
    seed: int, engine: str, launcher: str, background: str, data: Path, tmp_path: Path
) -> None:
    check(tmp_path, data, engine, 1, moments(seed, 50, JOB, launcher), background)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault("kill of one rank", trials=25)
@pytest.mark.parametrize(("seed", "engine", "launcher"), [(21, "local", "deepspeed"), (22, "deepspeed", "torchrun")])
def test_kills_of_one_rank(seed: int, engine: str, launcher: str, data: Path, tmp_path: Path) -> None:
    check(tmp_path, data, engine, 1, moments(seed, 25, ONE, launcher))

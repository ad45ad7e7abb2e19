"""Fifty real kills of a run on two ranks: never stuck, never a lost commit, and in the end not a bit is different."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain.runs import read_events
from tests.e2e.lives import Forked, Launched, a_second_later, final_files, killed, newest
from tests.pretrain.runs import make_data, training_curve

CONFIG = """
name: {name}
runs: {runs}
data: {{path: {data}, workers: 0}}
model: {{d_model: 16, encoder_layers: 1, decoder_layers: 2, heads: 2, ffn_dim: 32, max_positions: 128}}
objective: {{name: janus}}
batch: {{samples: 6, micro_max_tokens: 96}}
optim: {{lr: 1e-2, warmup: 2}}
engine: {{kind: {engine}, zero_stage: 2}}
train: {{steps: 100000, log_every: 1, validate_every: 7, validate_batches: 2, sample_every: 5, save_every: {every}}}
"""
BOTH, FIRST, SECOND = (0, 1), (0,), (1,)
WHO = (BOTH, SECOND, BOTH, FIRST)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"), 150)


def check(folder: Path, data: Path, engine: str, every: int, ends: list[tuple[str, tuple[int, ...], str]]) -> None:
    """Kills a run at every one of `ends`, lets it finish, and compares it with one that was left alone."""
    configs = {}
    for name in ("killed", "calm"):
        configs[name] = folder / f"{name}.yaml"
        text = CONFIG.format(name=name, runs=folder / "runs", data=data, engine=engine, every=every)
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


def moments(seed: int, count: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Half of them inside saves and deletions, a third of them of one rank alone."""
    draw = random.Random(seed)
    kinds = ("any", "save", "any", "deletion", "save", "progress")
    who = (BOTH, BOTH, FIRST, BOTH, BOTH, SECOND)
    return [(kinds[draw.randrange(6)], who[draw.randrange(6)], "") for _ in range(count)]


def test_three_kills(data: Path, tmp_path: Path) -> None:
    check(tmp_path, data, "local", 2, [("save", BOTH, ""), ("progress", SECOND, ""), ("deletion", FIRST, "")])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("engine", "launcher"), [("local", "torchrun"), ("deepspeed", "deepspeed")])
def test_fifty_kills(engine: str, launcher: str, data: Path, tmp_path: Path) -> None:
    ends = moments(11, 21)
    launched = [(moment, who, launcher) for moment, who in zip(("save", "progress", "any", "save"), WHO, strict=True)]
    for number, one in enumerate(launched):
        ends.insert(6 * number + 2, one)
    check(tmp_path, data, engine, 1, ends)

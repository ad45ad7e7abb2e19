"""Signals in every phase: one line, exit code 85, and a run that goes on as if nothing had been."""

import os
import pydoc
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.checkpoints.commit import Store
from pretrain.runs import read_events
from tests.e2e.lives import PATIENCE, Forked, Launched, a_second_later, final_files, newest
from tests.pretrain.runs import ROOT, SMALL, environment, make_data, training_curve

CONFIG = (
    SMALL
    + """\
engine: {{kind: local}}
train: {{steps: 100000, log_every: 1, validate_every: 3, validate_batches: 4, sample_every: 4, save_every: 5}}
"""
)
# Where the signal comes: a call, and how many of these go by before it in this life.
PLACES = {
    "waiting for data": ("pretrain.data.stream._MicroBatches.__getitem__", 11),
    "another waits for data": ("pretrain.loop.global_counts", 3),
    "the update": ("pretrain.engine.local.LocalEngine.step", 2),
    "validation": ("pretrain.engine.local.LocalEngine.evaluate", 1),
    "samples": ("pretrain.hooks.TextSamples.after_step", 3),
    "the save": ("pretrain.engine.state.copy", 0),
    "the commit": ("pretrain.checkpoints.commit.Store._publish", 0),
    "deletion": ("pretrain.checkpoints.commit.Store.retain", 0),
    "rendezvous": ("torch.distributed.init_process_group", 0),
    "loading data": ("pretrain.data.dataset.ShardDataset.__init__", 0),
    "making the model": ("pretrain.train.build_module", 0),
    "resuming": ("pretrain.engine.state.load", 0),
}
BOTH, FIRST, SECOND = (0, 1), (0,), (1,)
TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
WAITS = ("waiting for data", "another waits for data")
# Nothing has been done there that could be saved.
BEFORE = ("rendezvous", "loading data", "making the model", "resuming")
ALWAYS = {"rendezvous": BOTH, "another waits for data": SECOND, "the commit": FIRST, "deletion": FIRST}
Trial = tuple[str, signal.Signals, tuple[int, ...], int]


def every_trial() -> list[Trial]:
    """Each signal in each phase, in turn to one rank, the other and both; every second one doubled."""
    trials: list[Trial] = []
    for turn, number in enumerate((TERM, INT, USR1, TERM)):
        for index, phase in enumerate(PLACES):
            who = (BOTH, SECOND, FIRST)[(index + turn) % 3]
            who = ALWAYS.get(phase, who)
            trials.append((phase, number, who, 1 + (index + turn) % 2))
    return trials


def strike(trial: Trial) -> None:
    """Lets this rank signal itself where the trial says; a wait is then endless but for the signal."""
    phase, number, who, times = trial
    mine, place = int(os.environ["RANK"]) in who, PLACES[phase]
    if not mine and phase != "another waits for data":
        return
    if not mine:
        place = PLACES["waiting for data"]
    name, after = place
    owner, calls = pydoc.locate(name.rpartition(".")[0]), [0]
    true = getattr(owner, name.rpartition(".")[2])

    def struck(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == after + 1:
            for _ in range(times if mine else 0):
                os.kill(os.getpid(), number)
            if phase == "waiting for data" or not mine:
                time.sleep(PATIENCE)
            time.sleep(0.01)  # in the main thread, so that it hears of it
        return true(*arguments, **named)

    setattr(owner, name.rpartition(".")[2], struck)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"), 150)


def configs(folder: Path, data: Path) -> dict[str, Path]:
    made = {name: folder / f"{name}.yaml" for name in ("signalled", "calm")}
    for name, path in made.items():
        path.write_text(CONFIG.format(name=name, runs=folder / "runs", data=data))
    return made


def check(folder: Path, data: Path, trials: Sequence[Trial]) -> None:
    """One run through lives that each end by a signal; it must be the run that was left alone."""
    made, run = configs(folder, data), folder / "runs" / "signalled"
    for index, trial in enumerate(trials):
        before, journal = newest(run), len(read_events(run)) if (run / "events.jsonl").exists() else 0
        a_second_later(run)
        life = Forked(folder / f"life-{index}.log", "train", made["signalled"], before=partial(strike, trial))
        codes = life.wait()
        said = life.printed()
        assert codes == [85, 85], (trial, codes, said[-4000:])
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and lines[0].endswith("run the same command again to continue"), (trial, lines)
        assert "Traceback" not in said, (trial, said[-4000:])
        stops = [event for event in read_events(run)[journal:] if event["event"] == "stop"] if run.exists() else []
        assert len(stops) == (0 if trial[0] in BEFORE else 1), (trial, stops, said[-4000:])
        assert newest(run) >= before and (not stops or newest(run) == stops[0]["step"] > before), trial
    end = newest(run) + 3
    a_second_later(run)
    for name, path in made.items():
        life = Forked(folder / f"{name}.log", "train", path, f"train.steps={end}")
        assert life.wait() == [0, 0], life.printed()[-4000:]
    assert final_files(run, end) == final_files(folder / "runs" / "calm", end)
    assert training_curve(run) == training_curve(folder / "runs" / "calm"), "validation that was cut short came later"
    assert not [path.name for path in Store(run).folder.iterdir() if not path.name.startswith("step-")]


@pytest.mark.timeout(900)
@pytest.mark.fault("signals in each phase", trials=4)
def test_a_handful(data: Path, tmp_path: Path) -> None:
    check(tmp_path, data, [("waiting for data", INT, FIRST, 1), ("validation", TERM, SECOND, 2),
                           ("resuming", USR1, BOTH, 2), ("another waits for data", TERM, SECOND, 1)])  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.fault("signals in each phase", trials=4 * len(PLACES))
def test_every_phase_and_every_signal(data: Path, tmp_path: Path) -> None:
    check(tmp_path, data, every_trial())


def endless(name: str) -> None:
    owner = pydoc.locate(name.rpartition(".")[0])

    def wait(*_: Any, **__: Any) -> None:
        print("it has begun", flush=True)
        while True:
            time.sleep(0.05)

    setattr(owner, name.rpartition(".")[2], wait)


def begun(log: Callable[[], str], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while what not in log():
        assert time.monotonic() < deadline, log()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "count"),
    [(INT, 2), pytest.param(TERM, 3, marks=pytest.mark.slow)],
    ids=["second SIGINT", "third SIGTERM"],
)
@pytest.mark.fault("signals in each phase")
def test_who_insists_is_obeyed_at_once(number: signal.Signals, count: int, data: Path, tmp_path: Path) -> None:
    made, run = configs(tmp_path, data), tmp_path / "runs" / "signalled"
    stuck = partial(endless, "pretrain.engine.local.LocalEngine.evaluate")
    given = ("train", made["signalled"], "train.save_every=2", "train.async_save=false")
    life = Forked(tmp_path / "log", *given, before=stuck, ranks=1)
    begun(life.printed, "it has begun")
    for _ in range(count):
        assert life.alive()
        os.kill(int(life.ranks[0].pid or 0), number)
        time.sleep(1.2)
    assert life.wait() == [85]
    assert f"error: stopped at once by {number.name}, which came {count} times: run the same" in life.printed()
    assert newest(run) == 2


def catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("number", "program"),
    [(USR1, "pretrain"), *(pytest.param(n, "finetune", marks=pytest.mark.slow) for n in (TERM, INT))],
)
@pytest.mark.fault("signals in each phase")
def test_while_it_imports(number: signal.Signals, program: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", program, "train", str(tmp_path / "none.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not catches(process.pid, USR1):  # Python itself catches SIGINT
        time.sleep(0.001)
    process.send_signal(number)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 85, err
    assert err == f"error: stopped by {number.name}: run the same command again to continue\n"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [TERM, INT])
@pytest.mark.fault("signals in each phase")
def test_the_launcher_is_ended_and_its_ranks_save(number: signal.Signals, data: Path, tmp_path: Path) -> None:
    """The runner of `deepspeed` dies of a signal and passes nothing on."""
    made, run = configs(tmp_path, data), tmp_path / "runs" / "signalled"
    life = Launched(tmp_path / "log", "deepspeed", "train", made["signalled"])
    begun(life.printed, "step 3/")
    family = psutil.Process(life.process.pid).children(recursive=True)
    life.process.send_signal(number)
    life.process.wait(PATIENCE)
    _, alive = psutil.wait_procs(family, PATIENCE)
    for process in alive:
        process.kill()
    assert not alive, life.printed()
    assert read_events(run)[-1]["event"] == "stop" and newest(run) == read_events(run)[-1]["step"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.fault("signals in each phase", trials=3)
def test_the_hand_off(data: Path, tmp_path: Path) -> None:
    made, run, out = configs(tmp_path, data), tmp_path / "runs" / "calm", tmp_path / "bundle"
    assert Forked(tmp_path / "log", "train", made["calm"], "train.steps=2", ranks=1).wait() == [0]
    for number in (TERM, INT, USR1):
        before = partial(strike_at_hand_off, number)
        life = Forked(tmp_path / f"{number.name}.log", "handoff", run, "--out", out, before=before, ranks=1)
        assert life.wait() == [85], life.printed()
        assert f"error: stopped by {number.name}" in life.printed() and not out.exists()
    assert Forked(tmp_path / "last.log", "handoff", run, "--out", out, ranks=1).wait() == [0]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("bundle")] == ["bundle"]


def strike_at_hand_off(number: int) -> None:
    """The signal comes when the weights of the bundle are written, and all else is not."""
    from pretrain.bundles import bundle

    true = bundle.save_file

    def struck(*arguments: Any, **named: Any) -> None:
        true(*arguments, **named)
        os.kill(os.getpid(), number)
        time.sleep(PATIENCE)

    bundle.save_file = struck

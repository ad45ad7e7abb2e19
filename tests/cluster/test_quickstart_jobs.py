"""The quickstart's models, whole, under Slurm and on two hosts: resized, preempted, and one curve to the end."""

import contextlib
import io
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from finetune.quickstart import STORIES
from pretrain.__main__ import main
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.seal import verify
from pretrain.runs import read_events
from tests.cluster.conftest import Cluster
from tests.cluster.hosts import Hosts, pid_of, skip_where_impossible, until
from tests.pretrain.runs import ROOT, scalars
from tests.slurm import private_slurm

CONFIG = "configs/pretrain/quickstart.yaml"
STEPS = 220
PATIENCE = 1200.0
ROW = "quickstart-size job through a requeue and a resize"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * PATIENCE), pytest.mark.fault(ROW, trials=1)]
OBJECTIVES = pytest.mark.parametrize("objective", ["janus", "elmer"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the quickstart."""
    out = tmp_path_factory.mktemp("docs") / "data"
    words = ["--source", "stdlib-docs", "--train-tokenizer", "8192", "--max-length", "128"]
    assert main(["prepare", "--out", str(out), *words]) == 0
    return out


def overrides(objective: str, folder: Path, data: Path) -> list[str]:
    where = ["name=run", f"runs={folder}/runs", f"data.path={data}"]
    return [*where, "train.log_every=1", *STORIES[objective].objective]


def reached(run: Path, step: int, printed: Callable[[], str]) -> None:
    """Waits for an update in what the ranks print."""
    until(lambda: f"step {step}/{STEPS} " in printed(), f"update {step}", PATIENCE, lambda: printed()[-4000:])


def assert_one_curve(run: Path, ranks: list[int]) -> None:
    """Ended after lives on so many ranks; every update is there once, and the model has learnt."""
    events = [event for event in read_events(run) if event["event"] != "save"]
    assert [event["event"] for event in events] == ["start", *["stop", "resume"] * (len(ranks) - 1), "finish"]
    assert [event["ranks"] for event in events if event["event"] in ("start", "resume")] == ranks
    steps, losses = zip(*scalars(run)["loss/total"], strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    assert np.isfinite(losses).all() and np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert (run / "latest").read_text() == f"step-{STEPS:08d}\n" and not verify(Store(run).commits()[-1])


@OBJECTIVES
def test_under_slurm(objective: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"

    def script(nodes: int) -> Path:
        options = ["--nodes", nodes, "--gpus-per-node", "0", "--time", "60", "--signal-seconds", "60"]
        text = io.StringIO()
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(text):
            assert main(["slurm", CONFIG, *map(str, options), *overrides(objective, tmp_path, data)]) == 0
        path = tmp_path / f"{nodes}.sbatch"
        path.write_text(text.getvalue())
        return path

    def printed() -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(run.glob("slurm-*.out")))

    with private_slurm() as slurm:
        job = slurm.submit(script(1))
        reached(run, 50, printed)
        slurm.call("scancel", job)
        slurm.wait_until(lambda: read_events(run)[-1]["event"] == "stop", "the end of the ranks", printed)
        assert slurm.wait_for(job)["JobState"] == "CANCELLED"

        job = slurm.submit(script(2))
        reached(run, 120, printed)
        assert slurm.call("scancel", "--batch", "--signal=USR1", job).returncode == 0
        slurm.wait_for(job, ["RUNNING"], restarts=1)
        reached(run, STEPS, printed)
        found = slurm.wait_for(job)
        assert (found["JobState"], found["Restarts"], found["NumNodes"]) == ("COMPLETED", "1", "2"), printed()
    assert_one_curve(run, [1, 2, 2])


@OBJECTIVES
def test_by_the_deepspeed_launcher(objective: str, data: Path, tmp_path: Path) -> None:
    skip_where_impossible()
    cluster, log, run = Cluster(tmp_path), tmp_path / "log", tmp_path / "runs" / "run"
    log.touch()
    launcher = ["--hostfile", cluster.hostfile, "--launcher", "pdsh", "--master_port", "29871", "--force_multi"]
    words = ["--module", "pretrain", "train", CONFIG, *overrides(objective, tmp_path, data)]

    def life(*names: str) -> "subprocess.Popen[str]":
        cluster.hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
        return cluster.start(hosts, "deepspeed", *launcher, *words, log=log)

    def stop(launched: "subprocess.Popen[str]", step: int) -> None:
        reached(run, step, log.read_text)
        os.kill(pid_of("deepspeed", launched), signal.SIGTERM)
        assert launched.wait(PATIENCE) != 0
        until(lambda: read_events(run)[-1]["event"] == "stop", "the end of the ranks", PATIENCE, log.read_text)

    with Hosts(tmp_path / "hosts", ["head", "n1"]) as hosts:
        stop(life("head"), 50)
        stop(life("head", "n1"), 120)
        assert life("head", "n1").wait(PATIENCE) == 0, log.read_text()[-4000:]
    assert_one_curve(run, [1, 2, 2])
    assert [event["hosts"] for event in read_events(run) if event["event"] in ("start", "resume")] == [1, 2, 2]

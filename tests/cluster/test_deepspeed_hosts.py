"""`deepspeed --hostfile --launcher pdsh` over two hosts, for real: stopped, abandoned by pdsh, continued to the end."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.__main__ import main
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.seal import number, verify
from pretrain.runs import read_events
from tests.cluster.conftest import Cluster
from tests.cluster.hosts import Hosts, pid_of, until
from tests.pretrain.runs import command, scalars

PATIENCE = 600.0  # four processes that import torch and deepspeed, on a busy machine
ENDLESS, TAG = 1_000_000, "loss/total"
# Dropout draws differ between one rank and two.
PLAIN = ["model.dropout=0.0", "model.attention_dropout=0.0", "train.validate_every=0", "train.sample_every=0"]


def last_event(run: Path) -> tuple[str, int]:
    events = read_events(run) if (run / "events.jsonl").exists() else []
    return (events[-1]["event"], events[-1]["step"]) if events else ("", 0)


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
def test_two_hosts_through_a_stop_and_a_dead_pdsh(cluster: Cluster, tmp_path: Path, capsys: Any) -> None:
    cluster.hostfile.write_text("head slots=1\nn1 slots=1\n")
    log, run = tmp_path / "log", cluster.run
    launcher = ["deepspeed", "--hostfile", cluster.hostfile, "--launcher", "pdsh", "--master_port", "29871"]
    train = ["--module", "pretrain", "train", cluster.config, "engine.kind=deepspeed", "train.save_every=5", *PLAIN]

    def life(steps: int) -> "subprocess.Popen[str]":
        return cluster.start(hosts, *launcher, *train, f"train.steps={steps}", log=log)

    def wait_for(ready: Callable[[], Any], what: str) -> Any:
        return until(ready, what, PATIENCE, lambda: f":\n{log.read_text()[-4000:]}")

    def saved_after(step: int) -> Callable[[], bool]:
        return lambda: life_1.poll() is not None or (last_event(run)[0] == "save" and last_event(run)[1] > step)

    with Hosts(tmp_path / "hosts", ["head", "n1"]) as hosts:
        life_1 = life(ENDLESS)
        wait_for(saved_after(0), "a checkpoint")
        assert life_1.poll() is None, log.read_text()
        os.kill(pid_of("deepspeed", life_1), signal.SIGTERM)
        assert life_1.wait(PATIENCE) != 0
        event, stopped = wait_for(lambda: last_event(run)[0] == "stop" and last_event(run), "the end of the ranks")
        assert event == "stop" and number(Store(run).commits()[-1].name) == stopped

        life_1 = life(ENDLESS)
        wait_for(saved_after(stopped), "a checkpoint of the second life")
        assert life_1.poll() is None, log.read_text()
        os.kill(pid_of("pdsh", life_1), signal.SIGKILL)
        assert life_1.wait(PATIENCE) == 0, "deepspeed says that all is well"
        assert last_event(run)[0] != "finish", "the run does not"
        # What is left of the ranks ends when its host does.
        for name in hosts.names:
            hosts.kill(name)
    assert main(["status", str(run)]) == 0
    assert "finished" not in capsys.readouterr().out
    reached = max(number(commit.name) or 0 for commit in Store(run).commits())
    with Hosts(tmp_path / "hosts", ["head", "n1"]) as hosts:
        life_1 = life(reached + 5)
        assert life_1.wait(PATIENCE) == 0, log.read_text()[-4000:]
    events = read_events(run)
    assert (events[-1]["event"], events[-1]["step"]) == ("finish", reached + 5)
    assert {event["host"] for event in events} == {"head"}, "rank 0 is on the first host"
    assert [(e["hosts"], e["ranks"]) for e in events if e["event"] in ("start", "resume")] == [(2, 2)] * 3
    assert not verify(Store(run).commits()[-1])

    alone = ["train", cluster.config, "name=alone", f"train.steps={reached + 5}", "train.save_every=1000", *PLAIN]
    assert command(*alone)[0] == 0
    curve, expected = dict(scalars(run)[TAG]), dict(scalars(run.parent / "alone")[TAG])
    assert list(curve) == list(expected) == list(range(1, reached + 6)), "each update once"
    np.testing.assert_allclose(list(curve.values())[:10], list(expected.values())[:10], rtol=1e-4)
    np.testing.assert_allclose(list(curve.values()), list(expected.values()), rtol=0.05)

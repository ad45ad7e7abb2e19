"""Whole runs on two ranks: ZeRO-2 stopped by a signal to one rank and continued elsewhere; errors told once."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from pretrain.__main__ import main
from pretrain.bundles.bundle import load_bundle
from pretrain.runs import read_events
from tests.pretrain.runs import ROOT, environment, make_data, scalars, wait_for_save, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("text"), 150)


def start_ranks(size, *arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = environment() | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # as the deepspeed launcher writes it
        command = [sys.executable, "-m", "pretrain", f"--local_rank={rank}", *map(str, arguments)]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=shared | own, stdout=pipe, stderr=pipe, text=True))
    return ranks


def finish(ranks):
    """[(exit code, lines of stderr that begin with "error: ", everything printed)] of each rank."""
    ended = []
    for process in ranks:
        out, err = process.communicate(timeout=120)
        ended.append((process.returncode, [line for line in err.splitlines() if line.startswith("error: ")], out + err))
    return ended


def test_zero_2_stops_on_a_signal_to_one_rank_and_goes_on_alone(data, tmp_path):
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    steps = "train.steps=2000"
    ranks = start_ranks(2, "train", config, steps, "engine.kind=deepspeed", "engine.zero_stage=2", "data.workers=1")
    try:
        wait_for_save(ranks[0], run, seconds=120)
        os.kill(ranks[1].pid, signal.SIGTERM)
        (code0, errors0, _), (code1, errors1, printed1) = finish(ranks)
    finally:
        for process in ranks:
            process.kill()
    assert (code0, code1) == (85, 85)
    assert len(errors0) == 1 and "run the same command again" in errors0[0] and errors1 == [], printed1
    stopped = read_events(run)[-1]
    assert stopped["event"] == "stop" and stopped["step"] < 2000

    end = stopped["step"] + 3
    assert main(["train", str(config), f"train.steps={end}"]) == 0, "one rank and plain torch, no conversion"
    assert [step for step, _ in scalars(run)["loss/total"]] == list(range(1, end + 1))
    assert main(["handoff", str(run), "--out", str(tmp_path / "bundle")]) == 0
    assert load_bundle(tmp_path / "bundle").provenance["step"] == end


def test_errors_that_all_ranks_share_are_told_once(tmp_path, data):
    few = make_data(tmp_path, 2)
    config = write_config(tmp_path, few)
    for arguments, code, message in (
        (("train", config, "optim.lrr=1"), 3, "unknown key `optim.lrr`"),
        (("train", config, "batch.samples=2"), 4, "at least one training sample for each of 3 ranks, it has 2"),
    ):
        ended = finish(start_ranks(3, *arguments))
        assert [one[0] for one in ended] == [code] * 3, ended
        assert [len(one[1]) for one in ended] == [1, 0, 0], ended
        assert message in ended[0][1][0]
        assert not any("Traceback" in one[2] for one in ended)

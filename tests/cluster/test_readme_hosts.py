"""The commands that README gives for several hosts run there, in their order, cut down."""

import shlex
from pathlib import Path

import pytest

from pretrain.runs import read_events
from tests.cluster.conftest import Cluster
from tests.cluster.hosts import Hosts
from tests.e2e.test_readme import README, SMALLER
from tests.pretrain.runs import ROOT

FENCE, PORT = "```sh hosts\n", ["--master_port", "29871"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_for_hosts_runs(cluster: Cluster, tmp_path: Path) -> None:
    lines = [line for block in README.split(FENCE)[1:] for line in block.split("```")[0].splitlines() if line]
    if not lines:
        pytest.skip("README has no commands for several hosts")
    for name in ("pretrain", "finetune", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "docs").symlink_to(cluster.data)
    (tmp_path / "hostfile").write_text("head slots=1\nn1 slots=1\n")
    with Hosts(tmp_path / "hosts", ["head", "n1"]) as hosts:
        for line in lines:
            words = shlex.split(line)
            for config, overrides in SMALLER.items():
                words += overrides if config in words else []
            if words[0] == "deepspeed":
                words[1:1] = PORT
            words += PORT if "launch-check" in words else []
            process = cluster.start(hosts, *words, folder=tmp_path)
            out, err = process.communicate(timeout=900)
            assert process.returncode == 0, f"{line}\n{out[-2000:]}\n{err[-4000:]}"
    run = next(tmp_path.glob("runs/*"))
    assert (read_events(run)[-1]["event"], read_events(run)[0]["hosts"]) == ("finish", 2)

"""A tiny configuration on a cluster of pseudo-hosts, and deepspeed's environment file for it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Hosts, login, skip_where_impossible
from tests.pretrain.runs import ROOT, make_data, write_config


class Cluster:
    """What the tests share: a folder, a configuration and commands on the first of some hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, make_data(folder, 40)
        self.config, self.run = write_config(folder, self.data), folder / "runs" / "tiny"
        self.hostfile, self.home = folder / "hostfile", folder / "home"
        self.home.mkdir()
        (self.home / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")

    def start(self, hosts: Hosts, *words: Any, folder: Path = ROOT, log: Path | None = None) -> "subprocess.Popen[str]":
        """Starts `words` on the first host, in the checkout, as a user who has logged in there."""
        out = log.open("a") if log else subprocess.PIPE
        command = hosts.command(hosts.names[0], folder, *words)
        return subprocess.Popen(command, env=login(self.home), stdout=out, stderr=out, text=True)

    def check(self, hosts: Hosts, *words: Any) -> tuple[int, str]:
        """Exit code of `launch-check` and what it printed."""
        given = ["launch-check", "--hostfile", self.hostfile, "--master_port", "29871", self.config, *words]
        process = self.start(hosts, sys.executable, "-m", "pretrain", *given)
        out, err = process.communicate(timeout=400)
        return process.returncode, out + err


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    skip_where_impossible()
    return Cluster(tmp_path_factory.mktemp("cluster"))

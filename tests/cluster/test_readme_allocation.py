"""The command that README gives for deepspeed inside a Slurm allocation runs there, on two nodes, cut down."""

import shlex
import sys
from pathlib import Path

import pytest

from pretrain.runs import read_events
from tests.e2e.test_readme import README, SMALLER
from tests.pretrain.runs import ROOT, make_data
from tests.slurm import private_slurm

FENCE = "```sh allocation\n"


@pytest.mark.timeout(1800)
def test_deepspeed_starts_its_ranks_by_srun(tmp_path: Path) -> None:
    (line,) = README.split(FENCE)[1].split("```")[0].splitlines()
    words = shlex.split(line.replace("node-1", "n1"))
    for config, overrides in SMALLER.items():
        words += overrides if config in words else []
    for name in ("pretrain", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "docs").symlink_to(make_data(tmp_path, 40))
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    script, out = tmp_path / "job.sbatch", tmp_path / "out"
    options = f"#SBATCH --nodes=2 --ntasks-per-node=1 --time=30 --output={out}"
    path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    script.write_text(f"#!/bin/bash\n{options}\n{path}\ncd {shlex.quote(str(tmp_path))}\nexec {shlex.join(words)}\n")
    with private_slurm() as slurm:
        found = slurm.wait_for(slurm.submit(script))
    assert found["JobState"] == "COMPLETED", out.read_text()[-4000:]
    events = read_events(next(tmp_path.glob("runs/*")))
    assert (events[0]["ranks"], events[0]["hosts"], events[-1]["event"]) == (2, 2, "finish")

"""The quickstart, cut to two updates a phase: every step runs and the table has every row."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "objective", ["janus", "elmer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cmlm", "denoise"))]
)
def test_ends_with_its_table(objective: str, tmp_path: Path) -> None:
    cut = ["--steps", "2", "--tune-steps", "2", "--sentences", "4", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "finetune.quickstart", "--objective", objective, *cut],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    table = done.stdout[done.stdout.rindex("loss ") :]
    term = {"janus": "ar", "cmlm": "nar", "denoise": "ar", "elmer": "lplm"}[objective]
    rows = [f"quickstart-{objective}-nar nar", "AR, beam 4", "NAR, 5 passes"]
    if objective == "elmer":
        rows = ["quickstart-elmer-soft_exit exit_3", "quickstart-elmer-hard_exit", "hard exit at 0.5", "soft exit"]
    for row in (f"quickstart-{objective} {term}", *rows):
        assert row in table, table
    assert "tensorboard --logdir" in table
    assert list((tmp_path / "runs").glob("*/tb/*"))

"""compute-sanitizer finds nothing in any kernel: no access out of bounds, no race, no barrier that some miss."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import small

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


def test_the_small_run_runs(device):
    small.main(device.type, "cuda")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(device, tool):
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=places)
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    if device.type == "cpu":
        pytest.skip("it watches a GPU")
    # Only our kernels: others' libraries are theirs to watch, and would take minutes.
    names = "regex=vocab_loss|offramp|exit_copy|compact_rows|move_rows|attention|attend"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", names, sys.executable]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    done = subprocess.run(
        [*command, "-m", "tests.gpu.small"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

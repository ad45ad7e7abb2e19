"""The tests that need a GPU are sound: on a CPU, with PyTorch's operators, they pass."""

import os
import subprocess
import sys

from tests.kernels.cuda.emulation import ROOT


def test_they_pass_with_pytorch_s_operators():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--gpu-tests-on-cpu", "-p", "no:xdist", "tests/gpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " failed" not in done.stdout and " passed" in done.stdout

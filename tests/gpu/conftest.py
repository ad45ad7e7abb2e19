"""Tests of the kernels where they belong: on a GPU (`make test-gpu`).

With `--gpu-tests-on-cpu` they run on a CPU, where the operators are PyTorch: a way to find mistakes in the tests
themselves on machines without a GPU.
"""

import pytest
import torch

from parlance_kernels import backend, library


@pytest.fixture
def device(request, monkeypatch):
    """Where the tensors of a test live; `backend="cuda"` is there for its length. Skips without GPU and kernels."""
    if request.config.getoption("--gpu-tests-on-cpu"):
        monkeypatch.setattr(backend, "available_backends", lambda: ("torch", "cuda"))
        return torch.device("cpu")
    problem = library.problem()
    if problem:
        pytest.skip(f"no CUDA kernels: {problem}")
    return torch.device("cuda")

"""The CUDA sources on a CPU: the library that g++ makes of them, and tensors that notice writes beside them."""

import ctypes
import importlib.util
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
GUARD = 64  # numbers around a guarded tensor


@cache
def build_module():
    """kernels/csrc/build.py, which is a script beside the sources and in no package."""
    spec = importlib.util.spec_from_file_location("parlance_build", ROOT / "kernels" / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def host_library():
    """The kernels for this CPU; skips where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the CPU")
    library = ctypes.CDLL(str(build_module().build_for_host()))
    library.parlance_error.restype = ctypes.c_char_p
    return library


@cache
def device_library_path():
    """The library for GPUs, compiled for every target; skips where there is no nvcc."""
    module = build_module()
    if module.nvcc() is None:
        pytest.skip("no nvcc to compile the kernels")
    return module.build(module.OBJECTS, archs=module.ARCHS)


@contextmanager
def emulated(reverse=False):
    """Inside, launchers run on CPU tensors; `reverse`: threads and blocks from the last to the first."""
    from parlance_kernels import library

    host = host_library()
    host.simt_reverse(ctypes.c_int64(reverse))
    try:
        with mock.patch.object(library, "load", lambda: host):
            yield
    finally:
        host.simt_reverse(ctypes.c_int64(0))


def guarded(x, offset=0):
    """A copy of `x` between numbers that nobody may touch, `offset` of them off its alignment; and those around it.

    They are NaN or the most negative integer, so that reading one shows, too; `untouched` says whether all are left.
    """
    fill = float("nan") if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
    begin = GUARD + offset
    buffer = torch.full((begin + x.numel() + GUARD,), fill, dtype=x.dtype)
    inside = buffer[begin : begin + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside, (buffer[:begin], buffer[begin + x.numel() :])


def untouched(around):
    """Whether the numbers around a guarded tensor are what they were."""
    return all((x.isnan() if x.dtype.is_floating_point else x == torch.iinfo(x.dtype).min).all() for x in around)

"""The compiled kernels: where the library lies, whether this machine can run it, and calls that check what they return.

Launchers are `extern "C"` functions of pointers (tensors, or null), 64-bit integers, doubles and, last, a stream; they
return a CUDA error code (kernels/csrc/README.md).
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parlance_kernels.sources import fingerprint

PATH = Path(__file__).with_name("libparlance_kernels.so")
SOURCES = Path(__file__).resolve().parents[1] / "csrc"  # only in a checkout
OLDEST = (8, 0)  # compute capability that the kernels are compiled for, and flash attention
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NO_DRIVER, NO_IMAGE = 35, (209, 218, 222)


class KernelError(RuntimeError):
    """A kernel could not be found or started, or has failed; the message says which, and what helps."""


@cache
def load() -> ctypes.CDLL:
    """The library, opened once.

    Raises:
        KernelError: it was not built, does not open, or is not of the sources that lie in this checkout.
    """
    if not PATH.exists():
        raise KernelError(f"the CUDA kernels are not built: no {PATH}; `make kernels` builds them where nvcc is")
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        raise KernelError(f"{PATH} does not open: {error}; `make kernels` builds it anew") from None
    library.parlance_error.restype = library.parlance_sources.restype = ctypes.c_char_p
    if SOURCES.is_dir() and library.parlance_sources().decode() != fingerprint(SOURCES):
        raise KernelError(f"{PATH} was made of other sources than {SOURCES}; `make kernels` builds it anew")
    return library


def device_problem(who: str) -> str | None:
    """Why no GPU here can run code for compute capability 8.0, which `who` (such as `the kernels need`) begins with."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
    oldest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if oldest < OLDEST:
        return f"{who} compute capability 8.0 or later, a device here has {oldest[0]}.{oldest[1]}"
    return None


def problem() -> str | None:
    """Why the CUDA kernels cannot run on this machine; None where they can."""
    if why := device_problem("the kernels need"):
        return why
    try:
        load()
    except KernelError as error:
        return str(error)
    return None


def dtype_code(x: Tensor) -> int:
    """What launchers call the dtype of `x`.

    Raises:
        ValueError: no kernel takes it.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"CUDA kernels take float32, float16 or bfloat16, got {str(x.dtype).removeprefix('torch.')}")
    return DTYPES[x.dtype]


Argument = Tensor | ctypes.Array[Any] | int | float | None


def call(name: str, *args: Argument) -> None:
    """Starts launcher `name` on the device and the current stream of the first tensor in `args`.

    args: contiguous tensors on one device, arrays on the host, None as null pointer, and numbers: an int goes as
        int64, a float as double.

    Raises:
        ValueError: a tensor is not contiguous or on another device. KernelError: the launch failed.
    """
    library = load()
    try:
        launcher = getattr(library, name)
    except AttributeError:
        raise KernelError(f"{name} is not in {PATH}, which is older than this code: `make kernels`") from None
    device = next(x.device for x in args if isinstance(x, Tensor))
    stream = 0
    if device.type == "cuda":
        _check(library, name, library.parlance_use_device(ctypes.c_int64(device.index)))
        stream = torch.cuda.current_stream(device).cuda_stream
    given = [_as_c(name, x, device) for x in args]
    _check(library, name, launcher(*given, ctypes.c_void_p(stream)))


def _as_c(name: str, x: Argument, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        if not x.is_contiguous() or x.device != device:
            raise ValueError(f"{name}: tensors must be contiguous and on {device}, got {x.stride()} on {x.device}")
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, ctypes.Array):
        return x
    if x is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x)


def _check(library: ctypes.CDLL, name: str, code: int) -> None:
    if not code:
        return
    said = library.parlance_error(code).decode()
    if code == NO_DRIVER:
        said = (
            f"no NVIDIA driver here, or one older than the kernels' CUDA ({said}); `engine.backend: torch` needs none"
        )
    elif code in NO_IMAGE:
        said = f"not compiled for this device ({said}); PARLANCE_CUDA_ARCHS names others for `make kernels`"
    raise KernelError(f"{name}: {said} (CUDA error {code})")

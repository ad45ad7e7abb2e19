"""Which implementation of the operators runs. Chosen once per process by the caller, never switched silently.

`torch` is plain PyTorch on any device. `library` is the same, but attention on a GPU is a few variable-length calls of
the flash attention that PyTorch brings. `cuda` is the compiled kernels for tensors on a GPU. Tensors on the CPU of the
same machine have neither and go through PyTorch.
"""

from functools import cache

import torch

from parlance_kernels import library

BACKENDS = ("torch", "library", "cuda")


def problem(name: str) -> str | None:
    """Why a backend cannot run on this machine; None where it can."""
    if name == "cuda":
        return library.problem()
    if name == "library":
        flash = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
        absent = None if flash else "this torch is built without CUDA's flash attention"
        return library.device_problem("flash attention needs") or absent
    return None


@cache
def available_backends() -> tuple[str, ...]:
    """Names that `resolve` accepts on this machine, the fastest last."""
    return tuple(name for name in BACKENDS if problem(name) is None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def resolve(name: str) -> str:
    """Turns `auto` into the fastest available backend and checks any other name.

    Raises:
        ValueError: if `name` is not available here; the message lists what is, and why the asked one is not.
    """
    if name == "torch":
        return name
    available = available_backends()
    if name == "auto":
        return available[-1]
    if name not in available:
        why = f"; {problem(name)}" if name in BACKENDS else ""
        raise ValueError(f"backend `{name}` must be one of {', '.join(('auto', *available))} on this machine{why}")
    return name

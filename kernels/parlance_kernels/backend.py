"""Which implementation of the operators runs. Chosen once per process by the caller, never switched silently.

`torch` is plain PyTorch on any device. `cuda` is the compiled kernels for tensors on a GPU; tensors on the CPU of the
same machine have no kernels and go through PyTorch.
"""

from functools import cache

import torch

from parlance_kernels import library

BACKENDS = ("torch", "cuda")


@cache
def available_backends() -> tuple[str, ...]:
    """Names that `resolve` accepts on this machine, the fastest last."""
    return BACKENDS[:1] if library.problem() else BACKENDS


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def resolve(name: str) -> str:
    """Turns `auto` into the fastest available backend and checks any other name.

    Raises:
        ValueError: if `name` is not available here; the message lists what is, and why the kernels are not.
    """
    if name == "torch":
        return name
    available = available_backends()
    if name == "auto":
        return available[-1]
    if name not in available:
        why = f"; {library.problem()}" if name in BACKENDS else ""
        raise ValueError(f"backend `{name}` must be one of {', '.join(('auto', *available))} on this machine{why}")
    return name

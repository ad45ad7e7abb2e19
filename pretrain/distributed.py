"""The process group and the few things ranks tell each other outside the engine.

Works under the `deepspeed` launcher, under torchrun and under plain `python` (a world of one that opens no port).
Every function is collective: each rank calls it, in the same order. Without a process group they act as a world of one.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from pretrain import errors
from pretrain.errors import ConfigError, ParlanceError


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks, and where its tensors live."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def init(device: str = "auto") -> World:
    """Joins the ranks that the launcher started, or sets up a world of one.

    Args:
        device: `auto` (CUDA where there is one), `cpu` or `cuda`.

    Raises:
        ConfigError: `cuda` without a CUDA device, or fewer devices than local ranks.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"`device` must be auto, cpu or cuda, got {device!r}")
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ["RANK"]) if launched else 0
    size = int(os.environ["WORLD_SIZE"]) if launched else 1
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if launched else 0
    # DeepSpeed obeys the same variable; both must agree on where the model lives.
    cpu_asked = os.environ.get("DS_ACCELERATOR") == "cpu"
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available() and not cpu_asked)
    if on_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"`device` cuda needs a CUDA device for local rank {local_rank}, found {torch.cuda.device_count()}"
        )
    place = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        backend = "nccl" if on_cuda else "gloo"
        if launched:
            dist.init_process_group(backend, init_method="env://")
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(rank, size, local_rank, place)


def shutdown() -> None:
    """Leaves the process group; does nothing where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for every rank."""
    if _size() > 1:
        dist.barrier()


def sum_counts(counts: Mapping[str, float]) -> dict[str, float]:
    """Sums each entry over the ranks with one all-reduce in float64: exact for integers below 2**53.

    Every rank passes the same keys; a value that is an int on this rank comes back as an int.
    """
    keys = sorted(counts)
    totals = torch.tensor([float(counts[key]) for key in keys], dtype=torch.float64)
    summed = _all_reduce(totals, dist.ReduceOp.SUM).tolist()
    return {key: int(value) if isinstance(counts[key], int) else value for key, value in zip(keys, summed, strict=True)}


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on at least one."""
    return bool(_all_reduce(torch.tensor([int(flag)], dtype=torch.int32), dist.ReduceOp.MAX).item())


def exchange(value: Any) -> list[Any]:
    """The JSON-able `value` of every rank, in rank order, on every rank."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    if _size() == 1:
        return [json.loads(bytes(text.tolist()))]
    longest = int(_all_reduce(torch.tensor([len(text)]), dist.ReduceOp.MAX).item())
    padded = torch.full((longest,), ord(" "), dtype=torch.uint8, device=_device())  # JSON ignores the spaces
    padded[: len(text)] = text
    texts = [torch.empty_like(padded) for _ in range(_size())]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(one.tolist())) for one in texts]


def broadcast_object(value: Any) -> Any:
    """The JSON-able `value` of rank 0 on every rank; what the others pass is ignored."""
    return exchange(value if _rank() == 0 else None)[0]


def agree(error: ParlanceError | None) -> None:
    """Raises the error of the lowest rank that has one, on every rank, so that no rank waits for a dead one."""
    for found in exchange(None if error is None else [type(error).__name__, str(error)]):
        if found is not None:
            kind, message = found
            raise getattr(errors, kind, ParlanceError)(message)


def rank_zero(action: Callable[[], Any]) -> Any:
    """Runs `action` on rank 0 and hands its JSON-able result, or its ParlanceError, to every rank."""
    result, error = None, None
    if _rank() == 0:
        try:
            result = action()
        except ParlanceError as problem:
            error = problem
    agree(error)
    return broadcast_object(result)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _all_reduce(values: Tensor, operation: Any) -> Tensor:
    if _size() == 1:
        return values
    values = values.to(_device())
    dist.all_reduce(values, op=operation)
    return values.cpu()

"""The process group and the few things ranks tell each other outside the engine.

Works under the `deepspeed` launcher, torchrun, Slurm's `srun` and plain `python` (a world of one that opens no port).
Every function is collective: each rank calls it, in the same order. Without a process group they act as a world of one.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from pretrain import errors, slurm
from pretrain.errors import ConfigError, ParlanceError

# NCCL then remembers its last collectives and writes them down when one does not end; the size has two names, of which
# later versions warn of the first.
FLIGHT_RECORDER = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCH_FR_BUFFER_SIZE" if torch.__version__ >= "2.13" else "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
POLL = 0.2  # seconds that a rank waits for its own thread before it tells the others: no collective is held for long
ErrorT = TypeVar("ErrorT", bound=ParlanceError)
MadeT = TypeVar("MadeT")


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks, and where its tensors live.

    tensor_parallel: ranks that share one model; neighbours, which read the same data.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    tensor_parallel: int = 1

    @property
    def tensor_rank(self) -> int:
        """The place of this rank among those that share its model."""
        return self.rank % self.tensor_parallel

    @property
    def data_rank(self) -> int:
        """Which share of the data is this rank's, of `data_size`."""
        return self.rank // self.tensor_parallel

    @property
    def data_size(self) -> int:
        return self.size // self.tensor_parallel

    def divided(self, degree: int) -> "World":
        """The same ranks with `degree` of them to a model; raises ConfigError where they do not divide."""
        if self.size % degree:
            raise ConfigError(f"`engine.tensor_parallel` must divide the number of ranks ({self.size}), got {degree}")
        return replace(self, tensor_parallel=degree)


def init(device: str = "auto") -> World:
    """Joins the ranks that the launcher or `srun` started, or sets up a world of one.

    Args:
        device: `auto` (CUDA where there is one), `cpu` or `cuda`.

    Raises:
        ConfigError: `cuda` without a CUDA device, fewer devices than local ranks, or Slurm's variables are damaged.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"`device` must be auto, cpu or cuda, got {device!r}")
    os.environ.update(slurm.rank_variables(os.environ))
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
        for name, value in FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
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


def broadcast(value: Tensor, source: int, group: Any = None) -> None:
    """Gives `value`, on the device or not, what that of rank `source` holds, on all ranks of `group`."""
    if _size() == 1:
        return
    there = value.to(_device())
    dist.broadcast(there, src=source, group=group)
    if there is not value:
        value.copy_(there)


def broadcast_object(value: Any) -> Any:
    """The JSON-able `value` of rank 0 on every rank; what the others pass is ignored."""
    return exchange(value if _rank() == 0 else None)[0]


def shared(error: ErrorT) -> ErrorT:
    """Marks an error that every rank raises, so that rank 0 alone prints it."""
    error.shared = True
    return error


def agree(error: ParlanceError | None) -> None:
    """Raises the error of the lowest rank that has one, on every rank, so that no rank waits for a dead one."""
    if not any_rank(error is not None):
        return
    if error is not None and error.shared:
        raise error
    mine = None if error is None else [type(error).__name__, str(error), socket.gethostname()]
    rank, found = next((rank, found) for rank, found in enumerate(exchange(mine)) if found is not None)
    kind, message, host = found
    where = f" (rank {rank} on {host})" if rank else ""
    raise shared(getattr(errors, kind, ParlanceError)(message + where))


def together(make: Callable[[], MadeT]) -> MadeT:
    """Runs `make` on every rank; a ParlanceError on any of them is raised on all. No collectives inside."""
    made: Any = None
    error: ParlanceError | None = None
    try:
        made = make()
    except ParlanceError as problem:
        error = problem
    agree(error)
    result: MadeT = made
    return result


def rank_zero(action: Callable[[], Any], long: bool = False) -> Any:
    """Runs `action` on rank 0 and hands its JSON-able result, or its ParlanceError, to every rank.

    long: it may take longer than a collective may (10 minutes with NCCL), so it runs in a thread and all ask for it.
    """
    mine: Callable[[], Any] = action if _rank() == 0 else lambda: None
    return broadcast_object(together(_asked_for(mine) if long and _size() > 1 else mine))


def _asked_for(action: Callable[[], MadeT]) -> Callable[[], MadeT]:
    """Runs `action` in a thread while all ranks ask whether all are done; what it made, or raised, when called."""
    done: Future[MadeT] = Future()

    def run() -> None:
        try:
            done.set_result(action())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="long", daemon=True)
    thread.start()
    thread.join(POLL)
    await_all(thread)
    return done.result


def await_all(thread: threading.Thread, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Waits for a thread of every rank. meanwhile: called as long as there is one."""
    while any_rank(thread.is_alive()):
        meanwhile()
        thread.join(POLL)


def check_same(what: str, values: Mapping[str, Any], kind: type[ParlanceError]) -> None:
    """Raises `kind` on every rank where one has other JSON-able `values` than rank 0, naming key, rank and host."""
    told = exchange([socket.gethostname(), dict(values)])
    host_0, values_0 = told[0]
    for rank, (host, theirs) in enumerate(told):
        for key in sorted(values_0.keys() | theirs.keys()):
            if theirs.get(key) != values_0.get(key):
                raise shared(
                    kind(
                        f"{what} must be the same on every rank: `{key}` is {theirs.get(key)!r:.80} on rank {rank} "
                        f"({host}), {values_0.get(key)!r:.80} on rank 0 ({host_0})"
                    )
                )


def count_hosts() -> int:
    """Machines that the ranks run on."""
    return len(set(exchange(socket.gethostname())))


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

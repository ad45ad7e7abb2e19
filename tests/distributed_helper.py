"""Runs a function on several gloo ranks in processes of their own."""

import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Calls `fn(world_of_this_rank, *args)` on `world` ranks and returns what each returned, in rank order.

    `fn` must be importable (a function at the top of a test file); its first argument is a `distributed.World` on the
    CPU. Arguments and results are pickled. An exception on any rank fails the test with that rank's traceback, and the
    other ranks are ended.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    port = _free_port()
    ranks = [context.Process(target=_rank, args=(rank, world, port, results, fn, args)) for rank in range(world)]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in ranks:
            rank, failure, value = results.get(timeout=timeout)
            if failure:
                raise AssertionError(f"rank {rank} of {world} failed:\n{failure}")
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"no answer from ranks {sorted({*range(world)} - {*found})} in {timeout} s") from None
    finally:
        for process in ranks:
            process.join(timeout=10.0 if len(found) == world else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [found[rank] for rank in range(world)]


def _rank(rank: int, world: int, port: int, results: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    from pretrain import distributed

    try:
        value = fn(distributed.init("cpu"), *args)
        results.put((rank, "", value))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        distributed.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""What the table of `plan` is made of: arithmetic on the configuration, the index of the data and a first update."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import psutil
import torch

from pretrain.assemble import build_module, build_stream
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.seal import number
from pretrain.config import RunConfig
from pretrain.cost.flops import Flops, batch_flops
from pretrain.cost.memory import Memory, activation_bytes, checkpoint_bytes, rank_memory
from pretrain.data.dataset import ShardDataset
from pretrain.data.plan import StepPlan
from pretrain.data.stream import SampleStream
from pretrain.distributed import World
from pretrain.objectives import ObjectiveModule
from pretrain.objectives.batch import TokenBatch

RESERVED = 2 * 10**9  # bytes that CUDA and the libraries take of a GPU for themselves
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Figures:
    """What is known before anything is started.

    flops, samples, tokens: of one update over all ranks, the first one. sources: names.
    kept: bytes of activations for each target token of a micro-batch. batches: those of one rank of a world of one.
    needed: bytes of memory that must fit into `capacity`, those in the host's too where the device is the host.
    reserved: bytes of `capacity` that are not ours.
    data_seconds: one process takes to read, corrupt and pack the samples of an update. done: updates at the newest
    checkpoint of the run, 0 where it has none.
    """

    settings: RunConfig
    inherited: bool
    sources: Sequence[str]
    stream: SampleStream
    module: ObjectiveModule
    ranks: int
    step: StepPlan
    batches: Sequence[TokenBatch]
    flops: Flops
    kept: float
    memory: Memory
    needed: int
    capacity: int
    reserved: int
    checkpoint: int
    data_seconds: float
    done: int

    @property
    def left(self) -> int:
        """Updates that remain to be done."""
        return max(0, self.settings.train.steps - self.done)

    @property
    def fits(self) -> bool:
        return self.needed + self.reserved <= self.capacity

    def memory_of(self, ranks: int, device: str) -> Memory:
        """What a rank of `ranks` holds."""
        batch, engine, copies = self.settings.batch, self.settings.engine, ranks // self.settings.engine.tensor_parallel
        # One sample more or less decides which rank has the most.
        largest = min(batch.micro_max_tokens, self.step.tokens // copies + self.stream.corpus.longest)
        kept = int(self.kept * largest)
        return rank_memory(self.module, self.settings.model, engine, ranks, device, kept, self.inherited)


def compute(settings: RunConfig, dataset: ShardDataset, world: World, inherited: bool, gpu: int | None) -> Figures:
    """The figures of a run of `world`.

    inherited: the weights will be those of a bundle. gpu: bytes of each GPU of a cluster; None: it is this machine.
    """
    device = world.device.type if gpu is None else "cuda"
    with torch.device("meta"):
        module = build_module(settings, dataset)
    stream = build_stream(settings, dataset, module.objective, world)
    stream.workers = 0
    started = time.perf_counter()
    with closing(stream.windows(0, 0, 1)) as windows:
        batches: Sequence[Any] = next(windows).batches
    data_seconds = time.perf_counter() - started
    step, model, engine = stream.plan_step(0, world.data_size), settings.model, settings.engine
    how = engine.precision, device, engine.activation_checkpointing, engine.tensor_parallel
    figures = Figures(
        settings=settings,
        inherited=inherited,
        sources=[source.name for source in dataset.manifest.sources],
        stream=stream,
        module=module,
        ranks=world.size,
        step=step,
        batches=batches,
        flops=reduce(add, (batch_flops(model, batch) for batch in batches)),
        kept=max(activation_bytes(model, batch, *how) / batch.n_tokens for batch in batches),
        memory=Memory({}),
        needed=0,
        capacity=_capacity(world.device, world.size) if gpu is None else gpu,
        reserved=0 if gpu is None else RESERVED,
        checkpoint=checkpoint_bytes(module, world.size),
        data_seconds=data_seconds,
        done=max((number(commit.name) or 0 for commit in Store(settings.run_dir).commits()), default=0),
    )
    memory = figures.memory_of(world.size, device)
    return replace(figures, memory=memory, needed=memory.everywhere if device == "cpu" else memory.total)


def _capacity(device: torch.device, ranks: int) -> int:
    """Bytes that one rank may fill: its GPU, or its share of the memory that this machine gives to us."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [psutil.virtual_memory().total]
    if CGROUP_LIMIT.is_file() and (text := CGROUP_LIMIT.read_text().strip()).isdecimal():
        limits.append(int(text))
    return min(limits) // ranks

"""`plan`: what a configuration will take, before anyone waits for it. Starts nothing and writes nothing.

Batch, length, parameters, disk and operations are arithmetic on the configuration and the index of the data; memory is
arithmetic with an estimate for activations; time is measured with a few updates on this machine.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from operator import add
from pathlib import Path
from typing import Any

import psutil
import torch

from pretrain import config, distributed
from pretrain.assemble import build_module, build_stream, complete_config, has_checkpoint
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.seal import number
from pretrain.config import RunConfig
from pretrain.cost.flops import Flops, batch_flops, parameters_by_part
from pretrain.cost.memory import Memory, activation_bytes, checkpoint_bytes, rank_memory
from pretrain.cost.peak import device_peak
from pretrain.data.dataset import ShardDataset
from pretrain.data.plan import StepPlan
from pretrain.data.stream import SampleStream, Window
from pretrain.distributed import World
from pretrain.engine import build
from pretrain.engine.tensor_parallel import check as check_cut
from pretrain.errors import ConfigError, DiskError
from pretrain.loop import Progress, StepReport, fit
from pretrain.objectives import ObjectiveModule
from pretrain.objectives.batch import TokenBatch
from pretrain.report.findings import shown_bytes
from pretrain.report.simulate import Assumptions, cluster, simulated
from pretrain.train import complete_options
from pretrain.watch.console import clock, short

# GPUs that people have, and what CUDA and the libraries take of each for themselves.
GPUS, RESERVED = (("80 GB", 80 * 10**9), ("141 GB", 141 * 10**9)), 2 * 10**9
MOST_GPUS = 4096
UPDATES = 3  # measured; the first one warms up
# Without being asked, measure for about so long at most, supposing that this part of the peak is reached.
PATIENCE_SECONDS, EXPECTED_MFU = 30.0, 0.25
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Figures:
    """What the table is made of. flops, samples, tokens: of one update over all ranks, the first one. sources: names.

    kept: bytes of activations for each target token of a micro-batch. batches: those of one rank of a world of one.
    needed: bytes of memory that must fit into `capacity`, those in the host's too where the device is the host.
    data_seconds: one process takes to read, corrupt and pack the samples of an update. done: updates at the newest
    checkpoint of the run, 0 where it has none.
    """

    settings: RunConfig
    inherits: bool
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
    checkpoint: int
    data_seconds: float
    done: int

    @property
    def left(self) -> int:
        """Updates that remain to be done."""
        return max(0, self.settings.train.steps - self.done)

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    def memory_of(self, ranks: int, device: str) -> Memory:
        """What a rank of `ranks` holds."""
        batch, engine, copies = self.settings.batch, self.settings.engine, ranks // self.settings.engine.tensor_parallel
        # One sample more or less decides which rank has the most.
        largest = min(batch.micro_max_tokens, self.step.tokens // copies + self.stream.corpus.longest)
        kept = int(self.kept * largest)
        return rank_memory(self.module, self.settings.model, engine, ranks, device, kept, self.inherits)


def plan(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    ranks: int = 1,
    measure: bool | None = None,
    simulate: str | None = None,
    assume: Sequence[str] = (),
) -> None:
    """Prints the table for `ranks` ranks.

    measure: run updates here to tell the time; None: if they fit and take seconds. simulate: NODESxGPUS, a cluster that
    the table is about instead of this machine; assume: what `simulate.Assumptions` takes.

    Raises:
        ParlanceError: whatever `train` would refuse; below the table, DiskError if the checkpoints do not fit beside
            each other, ConfigError if a rank does not fit into the memory.
    """
    with ExitStack() as stack:
        world = distributed.init()
        stack.callback(distributed.shutdown)
        settings = complete_options(config.load(RunConfig, config_path, overrides))
        dataset = ShardDataset(settings.data.path, settings.data.on_bad_shard)
        # The table needs no weights; the bundle has given the shape of the model.
        inherits = settings.init_from is not None and not has_checkpoint(settings)
        settings = complete_config(settings, dataset).model_copy(update={"init_from": None})
        nodes, gpus = cluster(simulate) if simulate else (1, ranks)
        assumed = Assumptions.given(assume)
        asked = World(0, nodes * gpus, 0, world.device).divided(settings.engine.tensor_parallel)
        check_cut(settings.model, asked.tensor_parallel)
        figures = _figures(settings, dataset, asked, "cuda" if simulate else world.device.type, inherits)
        print(f"plan of {config_path} for {settings.run_dir}; nothing is started")
        for title, lines in _table(figures, world.device, simulate is not None):
            print(f"\n{title}", *lines, sep="\n  ")
        if simulate:
            step = figures.settings, figures.module, figures.step, figures.batches, figures.flops
            print(f"\non {nodes} x {gpus} GPUs", *simulated(*step, nodes, gpus, assumed), sep="\n  ", flush=True)
            return
        print("\ntime", *_time(figures, dataset, world, measure), sep="\n  ", flush=True)
        _check_disk(figures)
        _check_memory(figures)


def _figures(settings: RunConfig, dataset: ShardDataset, world: World, device: str, inherits: bool) -> Figures:
    """device: the kind that activations are kept on. inherits: the weights will be those of a bundle."""
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
        inherits=inherits,
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
        capacity=_capacity(world.device, world.size),
        checkpoint=checkpoint_bytes(module, world.size),
        data_seconds=data_seconds,
        done=max((number(commit.name) or 0 for commit in Store(settings.run_dir).commits()), default=0),
    )
    memory = figures.memory_of(world.size, device)
    return replace(figures, memory=memory, needed=memory.everywhere if device == "cpu" else memory.total)


def _table(figures: Figures, device: torch.device, elsewhere: bool) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of each block but the time. elsewhere: the ranks are not on this machine."""
    settings, step, ranks = figures.settings, figures.step, figures.ranks
    batch, train, engine = settings.batch, settings.train, settings.engine
    micros, samples = len(step.micro[0]), sum(figures.stream.corpus.sizes)
    given = f"{batch.samples:,} samples" if batch.samples else f"at most {batch.tokens:,} target tokens"
    yield (
        f"batch: {given} an update",
        [
            f"the first one {step.count:,} samples, {step.tokens:,} target tokens",
            f"= {ranks // engine.tensor_parallel} rank(s) x {micros} micro-batch(es) of at most "
            f"{batch.micro_max_tokens:,} tokens, accumulated",
            *([f"each of them {engine.tensor_parallel} that share a model"] if engine.tensor_parallel > 1 else []),
        ],
    )
    epochs = figures.stream.epoch(step.count * train.steps)
    yield (
        f"length: {train.steps:,} updates",
        [
            f"about {short(step.tokens * train.steps)} tokens, {epochs:.2f} epochs of {samples:,} samples",
            *_blend(figures, step.count * train.steps),
            *_begun(figures),
        ],
    )
    parts = parameters_by_part(figures.module.model)
    yield f"parameters: {sum(parts.values()):,}", [f"{count:>14,}  {part}" for part, count in parts.items()]

    how = f"ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else "local"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's memory, shared by ranks"
    total, room = shown_bytes(figures.needed), shown_bytes(figures.capacity)
    verdict = "" if elsewhere else f", {'fits in' if figures.fits else 'does NOT fit in'} {room} ({where})"
    saving = "".join(
        [
            f", tensor parallel {engine.tensor_parallel}" if engine.tensor_parallel > 1 else "",
            f", offload of {engine.offload}" if engine.offload != "none" else "",
            ", activation checkpointing" if engine.activation_checkpointing else "",
        ]
    )
    yield (
        f"memory of a rank, {how} {engine.precision}{saving}: {total}{verdict}",
        [
            *(f"{shown_bytes(count):>14}  {part}" for part, count in figures.memory.device.items() if count),
            *(f"{shown_bytes(count):>14}  {part}, in the host's memory" for part, count in figures.memory.host.items()),
            f"before all that it builds the whole model in the host's memory: {shown_bytes(figures.memory.building)}",
            "activations and buffers are estimates; Python and torch themselves come on top",
        ],
    )
    yield "GPUs that it fits on, by the same arithmetic", [_fewest(figures, *gpu) for gpu in GPUS]
    copies, free = train.keep + 1, shutil.disk_usage(_existing(settings.run_dir)).free
    yield (
        f"disk: {shown_bytes(copies * figures.checkpoint)} of {shown_bytes(free)} free",
        [f"{train.keep} checkpoint(s) kept and one being written, {shown_bytes(figures.checkpoint)} each"],
    )
    flops = figures.flops
    yield (
        f"work: {short(flops.training)}FLOP an update",
        [
            f"{getattr(flops, part) / flops.forward:>14.0%}  {part}"
            for part in ("encoder", "decoder", "attention", "heads")
        ],
    )


def _fewest(figures: Figures, name: str, size: int) -> str:
    """The fewest GPUs of that size, in powers of two times those that share a model."""
    ranks = figures.settings.engine.tensor_parallel
    while ranks <= MOST_GPUS:
        memory = figures.memory_of(ranks, "cuda")
        if memory.total + RESERVED <= size:
            host = shown_bytes(memory.in_host)
            return f"{ranks:,} of {name}: {shown_bytes(memory.total)} each, and {host} of the host's"
        ranks *= 2
    return f"none of {name}: {shown_bytes(memory.total)} each on {ranks // 2:,}"


def _begun(figures: Figures) -> Iterator[str]:
    """What is left of a run that exists."""
    if figures.done:
        yield f"{figures.done:,} of them are in a checkpoint of {figures.settings.run_dir}, {figures.left:,} remain"


def _blend(figures: Figures, drawn: int) -> Iterator[str]:
    """What `drawn` samples are of each source, where `data.weights` says how often it is drawn."""
    order = figures.stream.order
    if order.weights is None:
        return
    for name, size, share in zip(figures.sources, order.sizes, order.shares, strict=True):
        part = share / sum(order.shares)
        yield f"{part:>14.0%}  {name}: {drawn * part / max(1, size):.2f} epochs of {size:,} samples"


def _time(figures: Figures, dataset: ShardDataset, world: World, measure: bool | None) -> list[str]:
    """The lines about time: measured here and put in proportion, or why not."""
    settings, device, work = figures.settings, world.device, figures.flops.training
    if measure is False:
        return ["not measured"]
    if settings.engine.tensor_parallel > 1:
        return [f"not measured: {settings.engine.tensor_parallel} ranks would have to run here; --simulate estimates"]
    peak = device_peak(device, settings.engine.precision)
    # Each GPU has a rank of its own; ranks on a CPU are faster together only where one leaves cores to the others.
    cores = len(os.sched_getaffinity(0)) // torch.get_num_threads()
    speedup = figures.ranks if device.type == "cuda" else max(1, min(figures.ranks, cores))
    budget = PATIENCE_SECONDS * EXPECTED_MFU * peak.flops / UPDATES
    stream = figures.stream
    with closing(stream.windows(0, 0, speedup)) as windows:
        window = next(windows)
    batches: Sequence[Any] = window.batches
    sums = list(accumulate(batch_flops(settings.model, batch).training for batch in batches))
    if measure is None and not figures.fits:
        return ["not measured, as it does not fit; --measure tries"]
    if measure is None and sums[0] > budget:
        seconds = sums[0] * UPDATES / peak.flops / EXPECTED_MFU
        return [f"not measured: it may take {clock(seconds)} on this {device.type}; --measure does it"]
    micros = max(1, sum(done <= budget for done in sums))
    seconds = _measure(settings, dataset, world, replace(window, batches=window.batches[:micros]))
    compute = seconds * work / speedup / sums[micros - 1]
    workers = settings.data.workers * figures.ranks
    data = figures.data_seconds / max(1, workers)
    update = max(compute, data) if workers else compute + data
    # only what ranks do at once counts
    reached = work / update / (peak.flops * speedup)
    part = "" if micros == len(sums) else f", {micros} of {len(sums)} micro-batches"
    extent = f"for the {figures.left:,} that remain" if figures.done else "in all"
    return [
        f"{update:.3g} s an update, {clock(update * figures.left)} {extent} (h:mm:ss), "
        "without validation, saving and messages between ranks",
        f"{short(figures.step.tokens / update)} target tokens/s, "
        f"MFU {reached:.0%} of {short(peak.flops * speedup)}FLOP/s ({peak.source})",
        f"computing {compute:.3g} s (measured here on {device.type}{part}); "
        f"reading {data:.3g} s in {workers or 'no'} worker(s)",
    ]


def _measure(settings: RunConfig, dataset: ShardDataset, world: World, window: Window) -> float:
    """Seconds of an update that computes `window`, with learning rate 0."""
    alone = World(0, 1, world.local_rank, world.device)
    engine = build(settings.engine, settings.optim, build_module(settings, dataset), alone)
    clocked = _Clock()
    fit(engine, iter([window] * UPDATES), lambda step: 0.0, UPDATES, Progress(), [clocked])
    return min(clocked.seconds[1:])


class _Clock:
    """Hook that keeps the times of updates."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def after_step(self, report: StepReport) -> None:
        self.seconds.append(report.seconds - report.wait_seconds)


def _check_disk(figures: Figures) -> None:
    folder, copies = figures.settings.run_dir, figures.settings.train.keep + 1
    needed, free = copies * figures.checkpoint, shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise DiskError(
            f"`{folder}` must have room for {copies} checkpoints, {shown_bytes(needed)}; {shown_bytes(free)} are free: "
            "lower `train.keep` or choose another `runs`"
        )


def _check_memory(figures: Figures) -> None:
    if not figures.fits:
        needed, room = shown_bytes(figures.needed), shown_bytes(figures.capacity)
        raise ConfigError(
            f"a rank must fit in {room} of memory, needs {needed}: lower `batch.micro_max_tokens`, or change `model`, "
            "`engine.zero_stage`, `engine.offload`, `engine.activation_checkpointing` or the number of ranks"
        )


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _capacity(device: torch.device, ranks: int) -> int:
    """Bytes that one rank may fill: its GPU, or its share of the memory that this machine gives to us."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [psutil.virtual_memory().total]
    if CGROUP_LIMIT.is_file() and (text := CGROUP_LIMIT.read_text().strip()).isdecimal():
        limits.append(int(text))
    return min(limits) // ranks

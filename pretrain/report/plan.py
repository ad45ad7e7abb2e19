"""`plan`: what a configuration will take, before anyone waits for it. Starts nothing and writes nothing.

Batch, length, parameters, disk and operations are arithmetic on the configuration and the index of the data; memory is
arithmetic with an estimate for activations; time is measured with a few updates on this machine.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from pretrain import config, distributed
from pretrain.assemble import complete_config, inherits
from pretrain.config import RunConfig
from pretrain.cost.flops import parameters_by_part
from pretrain.data.dataset import ShardDataset
from pretrain.distributed import World
from pretrain.engine.tensor_parallel import check as check_cut
from pretrain.errors import ConfigError, DiskError
from pretrain.report.figures import RESERVED, Figures, compute
from pretrain.report.findings import shown_bytes
from pretrain.report.measure import measured
from pretrain.report.simulate import Assumptions, cluster, simulated
from pretrain.train import complete_options
from pretrain.watch.console import short

# that people have
GPUS = (("80 GB", 80 * 10**9), ("141 GB", 141 * 10**9))
MOST_GPUS = 4096


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
        inherited = inherits(settings)
        settings = complete_config(settings, dataset).model_copy(update={"init_from": None})
        nodes, gpus = cluster(simulate) if simulate else (1, ranks)
        assumed = Assumptions.given(assume)
        asked = World(0, nodes * gpus, 0, world.device).divided(settings.engine.tensor_parallel)
        check_cut(settings.model, asked.tensor_parallel)
        figures = compute(settings, dataset, asked, inherited, round(assumed.gpu * 1e9) if simulate else None)
        print(f"plan of {config_path} for {settings.run_dir}; nothing is started")
        for title, lines in _table(figures, world.device, gpus if simulate else None):
            print(f"\n{title}", *lines, sep="\n  ")
        if simulate:
            print(f"\non {nodes} x {gpus} GPUs", *simulated(figures, nodes, gpus, assumed), sep="\n  ", flush=True)
        else:
            print("\ntime", *measured(figures, dataset, world, measure), sep="\n  ", flush=True)
            _check_disk(figures)
        _check_memory(figures)


def _table(figures: Figures, device: torch.device, gpus: int | None) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of each block but the time. gpus: of a machine of the cluster, where it is not about this one."""
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
    held = f"{room} of a GPU (assumed, {shown_bytes(RESERVED)} of them CUDA's)" if gpus else f"{room} ({where})"
    verdict = f"{'fits in' if figures.fits else 'does NOT fit in'} {held}"
    saving = "".join(
        [
            f", tensor parallel {engine.tensor_parallel}" if engine.tensor_parallel > 1 else "",
            f", offload of {engine.offload}" if engine.offload != "none" else "",
            ", activation checkpointing" if engine.activation_checkpointing else "",
        ]
    )
    yield (
        f"memory of a rank, {how} {engine.precision}{saving}: {total}, {verdict}",
        [
            *(f"{shown_bytes(count):>14}  {part}" for part, count in figures.memory.device.items() if count),
            *(f"{shown_bytes(count):>14}  {part}, in the host's memory" for part, count in figures.memory.host.items()),
            f"before all that each rank builds the whole model in the host's memory: "
            f"{shown_bytes(figures.memory.building)}",
            *(_node(figures, gpus) if gpus else ()),
            "activations and buffers are estimates; Python and torch themselves come on top",
        ],
    )
    yield "GPUs that it fits on, by the same arithmetic", [_fewest(figures, *gpu) for gpu in GPUS]
    copies, free = train.keep + 1, shutil.disk_usage(_existing(settings.run_dir)).free
    yield (
        f"disk: {shown_bytes(copies * figures.checkpoint)}" + ("" if gpus else f" of {shown_bytes(free)} free"),
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


def _node(figures: Figures, gpus: int) -> Iterator[str]:
    """What the ranks of one machine need of its memory together."""
    building, training = (shown_bytes(gpus * count) for count in (figures.memory.building, figures.memory.training))
    yield f"a node of {gpus:,} needs {building} of memory to begin with, {training} while it trains"


def _fewest(figures: Figures, name: str, size: int) -> str:
    """The fewest GPUs of that size, in powers of two times those that share a model."""
    ranks = figures.settings.engine.tensor_parallel
    while ranks <= MOST_GPUS:
        memory = figures.memory_of(ranks, "cuda")
        if memory.total + RESERVED <= size:
            host = shown_bytes(memory.in_host)
            return f"{ranks:,} of {name}: {shown_bytes(memory.total)} each, and each rank {host} of its host's memory"
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
        needed, room = shown_bytes(figures.needed), shown_bytes(max(0, figures.capacity - figures.reserved))
        raise ConfigError(
            f"a rank must fit in {room} of memory, needs {needed}: lower `batch.micro_max_tokens`, or change `model`, "
            "`engine.zero_stage`, `engine.offload`, `engine.activation_checkpointing` or the number of ranks"
        )


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())

"""The time of an update, measured: a few of them are run on this machine and put in proportion."""

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch

from pretrain.assemble import build_module
from pretrain.config import RunConfig
from pretrain.cost.flops import batch_flops
from pretrain.cost.peak import device_peak
from pretrain.data.dataset import ShardDataset
from pretrain.data.stream import Window
from pretrain.distributed import World
from pretrain.engine import build
from pretrain.loop import Progress, StepReport, fit
from pretrain.report.figures import Figures
from pretrain.watch.console import clock, short

UPDATES = 3  # measured; the first one warms up
# Without being asked, measure for about so long at most, supposing that this part of the peak is reached.
PATIENCE_SECONDS, EXPECTED_MFU = 30.0, 0.25


def measured(figures: Figures, dataset: ShardDataset, world: World, measure: bool | None) -> list[str]:
    """The lines about time: measured here and put in proportion, or why not.

    measure: as for `plan`.
    """
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
        return [
            f"not measured: it may take {clock(seconds, hours=True)} (h:mm:ss) on this {device.type}; --measure does it"
        ]
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
        f"{update:.3g} s an update, {clock(update * figures.left, hours=True)} {extent} (h:mm:ss), "
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

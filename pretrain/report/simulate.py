"""What an update would be on a cluster that is not here: batches, messages and a time from stated assumptions.

Nothing of it is measured. The time is arithmetic on the peak of a device, the part of it that is reached, and four
bandwidths; whoever knows better numbers gives them (`--assume`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from pretrain.cost.communication import data_parallel_payload, sent, tensor_parallel_payload
from pretrain.cost.offload import adam_bytes, pcie_payload
from pretrain.errors import ConfigError
from pretrain.report.figures import Figures
from pretrain.report.findings import shown_bytes
from pretrain.watch.console import clock, short


@dataclass(frozen=True)
class Assumptions:
    """gpu: GB of memory of one. peak_tflops: of one in the precision of the run. reached: part that computing reaches.

    node_gb, network_gb: GB/s that one GPU can send inside its machine, and out of it. pcie_gb: GB/s between one GPU and
    its host, from memory that is not pinned. host_gb: GB/s of the memory of a machine, shared by its ranks.
    """

    gpu: float = 80.0
    peak_tflops: float = 989.0
    reached: float = 0.4
    node_gb: float = 450.0
    network_gb: float = 50.0
    pcie_gb: float = 12.0
    host_gb: float = 300.0

    @classmethod
    def given(cls, texts: Sequence[str]) -> "Assumptions":
        """From `name=number` texts; raises ConfigError for one that is neither known nor a number above 0."""
        found = cls()
        known = [field.name for field in fields(cls)]
        for text in texts:
            name, _, number = text.partition("=")
            try:
                value = float(number)
            except ValueError:
                value = 0.0
            if name not in known or not 0 < value < float("inf"):
                raise ConfigError(f"`--assume` must be NAME=NUMBER of {', '.join(known)} and above 0, got {text!r}")
            found = replace(found, **{name: value})
        return found

    def __str__(self) -> str:
        return (
            f"{self.gpu:g} GB a GPU, {self.peak_tflops:g} TFLOP/s of which {self.reached:.0%} are reached, "
            f"{self.node_gb:g} GB/s from a GPU to others of its machine, {self.network_gb:g} GB/s out of it, "
            f"{self.pcie_gb:g} GB/s between a GPU and its host, {self.host_gb:g} GB/s of a machine's memory"
        )


def cluster(text: str) -> tuple[int, int]:
    """(machines, GPUs of each) of NODESxGPUS; raises ConfigError."""
    nodes, cross, gpus = text.partition("x")
    if not cross or not nodes.isdecimal() or not gpus.isdecimal() or not int(nodes) or not int(gpus):
        raise ConfigError(f"`--simulate` must be NODESxGPUS, for example 4x8, got {text!r}")
    return int(nodes), int(gpus)


def simulated(figures: Figures, nodes: int, gpus: int, assumed: Assumptions) -> list[str]:
    """The lines; no time where the model does not fit."""
    settings, step, flops = figures.settings, figures.step, figures.flops
    engine, ranks, steps = settings.engine, nodes * gpus, settings.train.steps
    degree, copies = engine.tensor_parallel, ranks // engine.tensor_parallel
    micros = len(step.micro[0])
    over = data_parallel_payload(figures.module, engine, copies, micros)
    # of the batches of all data-parallel ranks, each has its part
    whole = tensor_parallel_payload(settings.model, figures.batches, engine)
    within = {kind: count // copies for kind, count in whole.items()}
    moved = pcie_payload(figures.module, engine, copies, micros)
    lines = [
        f"{ranks:,} GPUs = {copies:,} data-parallel x {degree} that share a model",
        f"{step.count:,} samples, {step.tokens:,} target tokens an update; each data-parallel rank "
        f"{step.count / copies:.1f} samples in {micros} micro-batch(es)",
        *_messages("data-parallel ranks", over, copies),
        *_messages("ranks that share a model", within, degree),
        *([f"between a GPU and its host: {_parts(moved)}"] if moved else []),
    ]
    stated = f"assumed, not measured: {assumed}; messages go around rings at full bandwidth; "
    stated += "reading, validation and saving cost nothing"
    if not figures.fits:
        return [*lines, "no time, as it does not fit", stated]
    # neighbours share a model, so data-parallel ranks are on other machines as soon as there are some
    over_gb = assumed.node_gb if nodes == 1 else assumed.network_gb
    within_gb = assumed.node_gb if degree <= gpus and not gpus % degree else assumed.network_gb
    again = (flops.forward if engine.activation_checkpointing else 0) + flops.training
    computing = again / ranks / (assumed.peak_tflops * 1e12 * assumed.reached)
    sharing = sent(within, degree) / (within_gb * 1e9)
    reducing = sent(over, copies) / (over_gb * 1e9)
    moving = sum(moved.values()) / (assumed.pcie_gb * 1e9)
    adam = gpus * adam_bytes(figures.module, engine, copies) / (assumed.host_gb * 1e9)
    least, most = max(computing + sharing, reducing, moving) + adam, computing + sharing + reducing + moving + adam
    offloaded = f", {moving:.3g} s between GPU and host, {adam:.3g} s Adam on the host" if moved else ""
    hidden = "data-parallel messages and copies" if moved else "data-parallel messages"
    return [
        *lines,
        f"time: {computing:.3g} s computing, {sharing:.3g} s among ranks that share a model, {reducing:.3g} s among "
        f"data-parallel ranks{offloaded}",
        f"= {least:.3g} s an update if {hidden} hide behind computing, {most:.3g} s if none does",
        f"= {short(step.tokens / most)} to {short(step.tokens / least)} target tokens/s, "
        f"{clock(least * steps, hours=True)} to {clock(most * steps, hours=True)} for {steps:,} updates (h:mm:ss), "
        f"{least * steps * ranks / 3600:,.1f} to {most * steps * ranks / 3600:,.1f} GPU-hours",
        stated,
    ]


def _messages(among: str, payload: dict[str, int], ranks: int) -> list[str]:
    if not payload:
        return [f"no messages among {among}: there is one"]
    return [f"messages among {among}: {_parts(payload)}; each sends {shown_bytes(round(sent(payload, ranks)))}"]


def _parts(payload: dict[str, int]) -> str:
    return ", ".join(f"{kind} {shown_bytes(count)}" for kind, count in payload.items() if count)

"""What an update would be on a cluster that is not here: batches, messages and a time from stated assumptions.

Nothing of it is measured. The time is arithmetic on the peak of a device, the part of it that is reached, and two
bandwidths; whoever knows better numbers gives them (`--assume`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pretrain.config import RunConfig
from pretrain.cost.communication import data_parallel_payload, sent, tensor_parallel_payload
from pretrain.cost.flops import Flops
from pretrain.data.plan import StepPlan
from pretrain.errors import ConfigError
from pretrain.objectives import ObjectiveModule
from pretrain.report.findings import shown_bytes
from pretrain.watch.console import clock, short


@dataclass(frozen=True)
class Assumptions:
    """peak_tflops: of one GPU in the precision of the run. reached: part of it that computing reaches.

    node_gb, network_gb: GB/s that one GPU can send inside its machine, and out of it.
    """

    peak_tflops: float = 989.0
    reached: float = 0.4
    node_gb: float = 450.0
    network_gb: float = 50.0

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
            f"{self.peak_tflops:g} TFLOP/s a GPU of which {self.reached:.0%} are reached, {self.node_gb:g} GB/s from a "
            f"GPU to others of its machine, {self.network_gb:g} GB/s out of it"
        )


def cluster(text: str) -> tuple[int, int]:
    """(machines, GPUs of each) of NODESxGPUS; raises ConfigError."""
    nodes, cross, gpus = text.partition("x")
    if not cross or not nodes.isdecimal() or not gpus.isdecimal() or not int(nodes) or not int(gpus):
        raise ConfigError(f"`--simulate` must be NODESxGPUS, for example 4x8, got {text!r}")
    return int(nodes), int(gpus)


def simulated(
    settings: RunConfig,
    module: ObjectiveModule,
    step: StepPlan,
    batches: Sequence[Any],
    flops: Flops,
    nodes: int,
    gpus: int,
    assumed: Assumptions,
) -> list[str]:
    """The lines. batches: micro-batches of one data-parallel rank. flops: of the update over all ranks."""
    engine, ranks = settings.engine, nodes * gpus
    degree, copies = engine.tensor_parallel, ranks // engine.tensor_parallel
    micros = len(step.micro[0])
    over = data_parallel_payload(module, engine, copies, micros)
    within = tensor_parallel_payload(settings.model, batches, engine)
    # neighbours share a model, so data-parallel ranks are on other machines as soon as there are some
    over_gb = assumed.node_gb if nodes == 1 else assumed.network_gb
    within_gb = assumed.node_gb if degree <= gpus and not gpus % degree else assumed.network_gb
    again = (flops.forward if engine.activation_checkpointing else 0) + flops.training
    computing = again / ranks / (assumed.peak_tflops * 1e12 * assumed.reached)
    sharing = sent(within, degree) / (within_gb * 1e9)
    reducing = sent(over, copies) / (over_gb * 1e9)
    least, most = max(computing + sharing, reducing), computing + sharing + reducing
    lines = [
        f"{ranks:,} GPUs = {copies:,} data-parallel x {degree} that share a model",
        f"{step.count:,} samples, {step.tokens:,} target tokens an update; each data-parallel rank "
        f"{step.count / copies:.1f} samples in {micros} micro-batch(es)",
        *_messages("data-parallel ranks", over, copies),
        *_messages("ranks that share a model", within, degree),
        f"time: {computing:.3g} s computing, {sharing:.3g} s among ranks that share a model, {reducing:.3g} s among "
        "data-parallel ranks",
        f"= {least:.3g} s an update if data-parallel messages hide behind computing, {most:.3g} s if none does",
        f"= {short(step.tokens / most)} to {short(step.tokens / least)} target tokens/s, "
        f"{clock(least * settings.train.steps)} to {clock(most * settings.train.steps)} for {settings.train.steps:,} "
        "updates (h:mm:ss)",
        f"assumed, not measured: {assumed}; messages go around rings at full bandwidth; reading, validation and saving "
        "cost nothing",
    ]
    return lines


def _messages(among: str, payload: dict[str, int], ranks: int) -> list[str]:
    if not payload:
        return [f"no messages among {among}: there is one"]
    parts = ", ".join(f"{kind} {shown_bytes(count)}" for kind, count in payload.items())
    return [f"messages among {among}: {parts}; each sends {shown_bytes(round(sent(payload, ranks)))}"]

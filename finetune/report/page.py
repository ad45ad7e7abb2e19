"""The page in Markdown: every figure with what it was measured on, nothing that changes from one day to the next."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.report.figures import unit_of
from finetune.report.measured import Measured, equal_quality
from finetune.report.record import Record
from finetune.report.texts import CACHE, WARM_UP
from finetune.tasks import Pair
from pretrain.runs import PACKAGES, version
from pretrain.watch.console import short

PAGE, QUALITY, TRAINING = "report.md", "quality.png", "training.png"
SPECIAL = {ord(sign): f"\\{sign}" for sign in "\\`*_{}[]<>#|&~$"}


@dataclass(frozen=True)
class Findings:
    """All that a page tells. command: that makes it. split: of the pairs. shown: samples. pictures: those drawn."""

    command: str
    records: Sequence[Record]
    measured: Sequence[Measured]
    pairs: Sequence[Pair]
    split: str
    shown: int
    pictures: Sequence[str]

    @property
    def metrics(self) -> list[str]:
        return list(self.measured[0].scores.results)


def page(found: Findings) -> str:
    """The whole page."""
    first = found.records[0]
    parts = [
        f"# {first.task}: {cell(', '.join(record.name for record in found.records))}",
        f"Written by `{found.command}`.",
        "## Quality and latency",
        *_quality(found),
        *_exits(found),
        "## Training",
        *_training(found),
        "## Samples",
        *_samples(found),
        "## How to repeat it",
        *_repeat(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A Markdown table whose columns behind the first `words` are numbers."""
    rule = ["---"] * words + ["--:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def signature_table(signatures: Mapping[str, str]) -> str:
    """How each metric was computed."""
    rows = [[cell(name), f"`{said}`".replace("|", "\\|")] for name, said in signatures.items()]
    return table(["metric", "signature"], rows, words=2)


def cell(text: str) -> str:
    """`text` as Markdown that shows it as it is, on one line."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line.translate(SPECIAL)


def round_to(value: float) -> str:
    """A time in three or more digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# ------------------------------------------------------------------------------------------------------------ sections


def _quality(found: Findings) -> list[str]:
    judge = _judge(found.measured)
    head = ["run", "way", *(f"{cell(name)}{', %' if unit_of(name) == '%' else ''}" for name in found.metrics)]
    head += ["ms", "ms, 90 %", *(["times as fast"] if judge else []), "passes"]
    rows = []
    for one in found.measured:
        values = [f"{one.scores.values[name]:.2f}" for name in found.metrics]
        faster = [f"{judge.milliseconds / one.milliseconds:.1f}"] if judge else []
        times = [round_to(one.milliseconds), round_to(one.slow), *faster, f"{one.passes:.1f}"]
        rows.append([cell(one.way.record.name), one.way.name, *values, *times])
    told = (
        f"The first {len(found.pairs):,} {found.split} pairs of the task, each in a batch of its own; a source that "
        "comes twice was written once. ms: encoder and decoder of the median sentence, 90 %: within which nine of ten "
        f"were written. Each sentence was written in all ways in turn, after {WARM_UP} for warming up. passes: decoder "
        "passes a sentence, their mean."
    )
    if judge:
        told += f" times as fast: as {cell(judge.way.record.name)}, {judge.way.name}."
    return [_picture(found, QUALITY, "quality against latency"), table(head, rows, 2), told, *_notes(found)]


def _judge(measured: Sequence[Measured]) -> Measured | None:
    """What speeds are compared with, as the papers do: left to right with the widest beam, of the first such run."""
    return max((one for one in measured if one.way.mode == "ar"), key=lambda one: one.way.options["beam"], default=None)


def _notes(found: Findings) -> list[str]:
    notes = []
    calls = {frozenset(one.calls.items()) for one in found.measured}
    if len(calls) > 1:
        notes.append(
            "Not all of these times were taken side by side: what was written by an earlier call was kept. Compare "
            "them with care, or write everything again with `--restart`."
        )
    for record in found.records:
        cut = max(one.cut for one in found.measured if one.way.record is record)
        if cut:
            longest = next(one.way.writer for one in found.measured if one.way.record is record).description
            notes.append(f"{cell(record.name)} cut {cut:,} of these sources to {longest.longest_source:,} tokens.")
    empty = {side: sum(not getattr(pair, side) for pair in found.pairs) for side in ("source", "target")}
    if any(empty.values()):
        notes.append(
            f"Of these pairs {empty['source']:,} have an empty source and {empty['target']:,} an empty target."
        )
    return notes


def _exits(found: Findings) -> list[str]:
    left = [(one, one.exits) for one in found.measured if one.exits]
    if not left:
        return []
    layers = max(len(exits.tokens) for _, exits in left)
    head = ["run", "way", *(f"layer {layer}, %" for layer in range(1, layers + 1)), "mean layer", "tokens"]
    head += ["decoder GFLOP a sentence", "of these off-ramps, %"]
    rows = []
    for one, exits in left:
        shares = [f"{100 * share:.1f}" for share in exits.shares] + [""] * (layers - len(exits.shares))
        work = [f"{exits.flops / len(one.texts) / 1e9:.3g}", f"{100 * exits.ramp_flops / max(1, exits.flops):.0f}"]
        rows.append([cell(one.way.record.name), one.way.name, *shares, f"{exits.mean:.2f}",
                     f"{sum(exits.tokens):,}", *work])  # fmt: skip
    told = "Of the written tokens, EOS counted, of the texts above."
    return ["## Where tokens left the decoder", table(head, rows, 2), told]


def _training(found: Findings) -> list[str]:
    names = [cell(record.name) for record in found.records]
    lines: dict[str, Callable[[Record], str]] = {
        "tuned from": lambda record: cell(_origin(record)),
        "device, ranks": lambda record: f"{cell(record.cost.device)}, {record.cost.ranks}",
        "updates": lambda record: f"{record.cost.updates:,}",
        "bundle of update": lambda record: f"{record.cost.kept:,}",
        "samples until then": lambda record: f"{record.cost.samples:,}",
        "target tokens until then": lambda record: f"{record.cost.tokens:,}",
        "device-seconds of updates": lambda record: round_to(record.cost.device_seconds),
        "seconds of saving": lambda record: round_to(record.cost.save_seconds),
        "restarts": lambda record: str(record.cost.restarts),
    }
    rows = [[name, *(tell(record) for record in found.records)] for name, tell in lines.items()]
    told = (
        "Curves: TensorBoard (`tb` of each run). Costs: `events.jsonl` and the bundle's provenance. Device-seconds: "
        "seconds of updates times ranks; validation, and updates that a kill threw away, are not in them, nor is "
        "pre-training."
    )
    metric = found.metrics[0]
    level, reached = equal_quality(found.records, metric)
    parts = [_picture(found, TRAINING, "scores and losses in training"), table(["", *names], rows, 1), told]
    if not any(record.scores(metric) for record in found.records):
        parts.append(f"No run has written and scored validation texts by {cell(metric)} (`train.sample_every`).")
    if reached:
        cost = [[cell(one.record.name), one.mode, f"{one.updates:,}", round_to(one.device_seconds)] for one in reached]
        parts += [
            "### To equal quality",
            table(["run", "way", "updates", "device-seconds"], cost, 2),
            f"Until validation texts first had {cell(metric)} {level:.2f}, the best score that all of these reached; "
            "measured where `train.sample_every` was due, from TensorBoard.",
        ]
    return parts


def _origin(record: Record) -> str:
    """What the tuned bundle was made of."""
    before = record.provenance.get("tuned_from")
    if not isinstance(before, dict):
        return "not known"
    step, tokens = before.get("step"), before.get("tokens")
    name = str(before.get("run", before.get("imported_from", "not known")))
    seen = f", {short(tokens)} tokens" if isinstance(tokens, int) else ""
    return f"{name}, update {step:,}{seen}" if isinstance(step, int) else name


def _samples(found: Findings) -> list[str]:
    distinct = {pair.source: number for number, pair in reversed(list(enumerate(found.pairs)))}
    parts = []
    for number in sorted(distinct.values())[: found.shown]:
        pair = found.pairs[number]
        rows = [["source", cell(pair.source)], ["reference", cell(pair.target)]]
        texts: dict[tuple[str, str], list[str]] = {}
        for one in found.measured:
            texts.setdefault((one.way.record.name, one.texts[number].text), []).append(one.way.name)
        rows += [[f"{cell(run)}: {'; '.join(ways)}", cell(text) or "(nothing)"] for (run, text), ways in texts.items()]
        parts.append(table([f"pair {number + 1}", ""], rows, 2))
    return parts


def _repeat(found: Findings) -> list[str]:
    commands = dict.fromkeys(one.way.command for one in found.measured)
    writer = found.measured[0].way.writer
    device = torch.cuda.get_device_name(writer.device) if writer.device.type == "cuda" else platform.machine()
    signatures = found.measured[0].scores.signatures
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES if version(name))
    return [
        f"Texts and times are in [{CACHE}]({CACHE}), so that a second call writes what is new alone. The texts, for "
        f"FILE of {found.split}.source in the folder `task` of a run:",
        "\n".join(["```sh", *commands, "```"]),
        f"Written on {writer.device.type} ({cell(device)}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        f"thread(s)) with python {platform.python_version()}, {packages}.",
        "Scores:",
        signature_table(signatures),
    ]


def _picture(found: Findings, name: str, words: str) -> str:
    return f"![{words}]({Path(name).name})" if name in found.pictures else ""

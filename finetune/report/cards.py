"""`report --cards`: the scores of a report in the model card of each bundle, for people and for the Hugging Face hub.

A card is edited by people. So of its body and of its front matter only what stands between two lines that mark it is
written; where these lines are missing, they come to the end. The card is outside the seal of its bundle.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.report.measured import Measured
from finetune.report.page import cell, signature_table, table
from finetune.report.record import Record
from pretrain.bundles.bundle import content_sha256
from pretrain.bundles.card import CARD, END_TESTED, TESTED
from pretrain.checkpoints.commit import disk_errors
from pretrain.data.files import write_atomic
from pretrain.errors import CheckpointError
from pretrain.plain import read_plain

INDEX = "model-index"
INDEXED, END_INDEXED = "# test scores, by finetune report --cards", "# end of test scores"
RULE = "---\n"  # in front of and behind the front matter


def write_cards(measured: Sequence[Measured], split: str) -> list[Path]:
    """Puts what was measured on pairs of `split` into the card of each run's bundle, and returns the cards.

    Raises:
        CheckpointError: a bundle is no longer the one that has written, or as `check_card`.
        DiskError: the disk is full, over quota or read-only.
    """
    cards = []
    for folder in dict.fromkeys(one.way.record.folder for one in measured):
        own = [one for one in measured if one.way.record.folder == folder]
        record, wrote = own[0].way.record, own[0].way.bundle_sha256
        if content_sha256(record.bundle) != wrote:
            raise CheckpointError(f"`{record.bundle}` must stay as it was while it is measured, it has changed")
        card = record.bundle / CARD
        text = with_scores(_read(card), body(own, split), model_index(own, split), str(card))
        # What a kill leaves of a temporary file would break the seal if it lay in the bundle.
        with disk_errors(card):
            write_atomic(card, text.encode(), within=record.bundle.resolve().parent)
        cards.append(card)
    return cards


def check_card(record: Record) -> None:
    """Raises CheckpointError where the card of the run's bundle is none that scores can be written into."""
    card = record.bundle / CARD
    with_scores(_read(card), "", {}, str(card))


def with_scores(card: str, told: str, index: dict[str, Any], where: str) -> str:
    """`card` with `told` in its body and `index` in its front matter, in the place of those of an earlier call.

    Raises:
        CheckpointError: a line that marks a part is there without the other, the front matter is no YAML mapping, or
            people have written a `model-index` of their own into it.
    """
    front, text = "", card
    if card.startswith(RULE):
        head, end, text = f"\n{card.removeprefix(RULE)}".partition(f"\n{RULE}")
        if not end:
            raise CheckpointError(f"`{where}` must have a line --- behind its front matter, it has none")
        front = f"{head}\n".removeprefix("\n")
    made = yaml.safe_dump(index, sort_keys=False, allow_unicode=True, width=10**6)
    front = _put(front, INDEXED, END_INDEXED, made, where)
    try:
        values = yaml.safe_load(_put(front, INDEXED, END_INDEXED, "", where)) or {}
    except yaml.YAMLError as error:
        raise CheckpointError(f"`{where}` must begin with YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or INDEX in values:
        found = f"has one with {INDEX}" if isinstance(values, dict) else f"has a {type(values).__name__}"
        raise CheckpointError(f"`{where}` must begin with a YAML mapping without `{INDEX}`, it {found}")
    return f"{RULE}{front}{RULE}{_put(text, TESTED, END_TESTED, told, where)}"


def _put(text: str, start: str, end: str, part: str, where: str) -> str:
    """`text` with `part` between the lines `start` and `end`."""
    before, started, rest = text.partition(f"{start}\n")
    _, ended, behind = rest.partition(f"{end}\n")
    if bool(started) != bool(ended) or end in before:
        raise CheckpointError(f"`{where}` must have both or none of the lines `{start}` and `{end}`")
    if not started:
        before += "" if not text or text.endswith("\n") else "\n"
    return f"{before}{start}\n{part}{end}\n{behind}"


def _read(card: Path) -> str:
    try:
        return read_plain(card).decode().replace("\r\n", "\n")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"`{card}` must be a UTF-8 text file: {error}") from None


# --------------------------------------------------------------------------------------------------------------- parts


def body(measured: Sequence[Measured], split: str) -> str:
    """Tables of values and signatures, and the commands that write what was scored; lines, each with its end."""
    first = measured[0]
    names, lines, device = list(first.scores.results), first.scores.lines, first.way.writer.device.type
    rows = [[one.way.name, *(f"{one.scores.values[name]:.2f}" for name in names)] for one in measured]
    cut = f"; {first.cut:,} of the sources were cut" if first.cut else ""
    commands = [one.way.command.replace(str(one.way.record.bundle), "BUNDLE", 1) for one in measured]
    return "\n\n".join(
        [
            f"The first {lines:,} {split} pairs of `{first.way.record.task}`, written one at a time on {device}{cut}:",
            table(["mode", *map(cell, names)], rows, 1),
            "\n".join(["```sh", *dict.fromkeys(commands), "```"]),
            signature_table(first.scores.signatures) + "\n",
        ]
    )


def model_index(measured: Sequence[Measured], split: str) -> dict[str, Any]:
    """The same for the hub, which shows it beside the card: https://huggingface.co/docs/hub/model-cards."""
    first = measured[0]
    task, signatures = first.way.record.task, first.scores.signatures
    metrics = [
        {
            "type": name,
            "value": round(one.scores.values[name], 4),
            "name": f"{name}, {one.way.name}",
            "args": {"mode": one.way.mode, **one.way.options, "signature": signatures[name]},
        }
        for one in measured
        for name in one.scores.results
    ]
    dataset = {"type": task, "name": f"{task}, the first {first.scores.lines} pairs", "split": split}
    result = {"task": {"type": "text2text-generation"}, "dataset": dataset, "metrics": metrics}
    return {INDEX: [{"name": str(first.way.record.provenance.get("run", task)), "results": [result]}]}

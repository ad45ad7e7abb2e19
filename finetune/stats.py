"""`stats`: counts and mean lengths of a task's splits, beside what papers say of the set."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from finetune import tasks
from finetune.tasks import SPLITS, Pair, Published, SplitName
from pretrain.config import assign
from pretrain.errors import ConfigError, DataError
from pretrain.parsing import parse_scalar

COLUMNS = ("split", "pairs", "paper", "source words", "target words", "paper", "empty", "identical")


def stats(name: str, overrides: Sequence[str], as_json: bool = False) -> None:
    """Prints the statistics of task `name`; `overrides` are its options as `task.KEY=VALUE`.

    A split that cannot be read is told on stderr, with the reason.

    Raises:
        ConfigError: an unknown task or option.
        DataError: no split can be read; that of the training split.
    """
    values: dict[str, Any] = {"task": {"name": name}}
    for override in overrides:
        key, _, text = override.partition("=")
        if not key.startswith("task."):
            raise ConfigError(f"override `{override}` must look like task.KEY=VALUE")
        assign(values, key, parse_scalar(text, where=f"override `{override}`"))
    task = tasks.build(values["task"])
    found: dict[SplitName, dict[str, float]] = {}
    missing: dict[SplitName, DataError] = {}
    for split in SPLITS:
        try:
            pairs = task.pairs(split)
        except DataError as error:
            missing[split] = error
            continue
        if pairs:
            found[split] = measure(pairs)
    if not found:
        raise missing["train"]
    for split, why in missing.items():
        print(f"{split}: {why}", file=sys.stderr)
    if as_json:
        published = asdict(task.published) if task.published else None
        print(json.dumps({"task": name, "splits": found, "published": published}))
    else:
        print("\n".join(table(found, task.published)))


def measure(pairs: Sequence[Pair]) -> dict[str, float]:
    """Number of pairs, mean words a side, and the shares of pairs with an empty side or with equal sides.

    Words are what white space separates.
    """
    count = len(pairs)
    return {
        "pairs": count,
        "source_words": sum(len(pair.source.split()) for pair in pairs) / count,
        "target_words": sum(len(pair.target.split()) for pair in pairs) / count,
        "empty": sum(not (pair.source and pair.target) for pair in pairs) / count,
        "identical": sum(pair.source == pair.target for pair in pairs) / count,
    }


def table(found: Mapping[SplitName, Mapping[str, float]], published: Published | None) -> list[str]:
    """The lines of a table, a split a row; a dash where nothing is known."""
    paper = published or Published("")
    rows = [COLUMNS]
    for split in SPLITS:
        if split not in found and split not in paper.pairs:
            continue
        here = found.get(split)
        counted = (
            (f"{here['pairs']:,.0f}", f"{here['source_words']:.1f}", f"{here['target_words']:.1f}") if here else "---"
        )
        shares = (f"{here['empty']:.2%}", f"{here['identical']:.2%}") if here else "--"
        told = f"{paper.pairs[split]:,}" if split in paper.pairs else "-"
        words = f"{paper.target_words:.1f}" if paper.target_words else "-"
        rows.append((split, counted[0], told, counted[1], counted[2], words, *shares))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [*lines, f"paper: {paper.source}"] if published else lines

"""The registry of tasks: a new one is its file, one line here, one YAML and one test."""

from collections.abc import Callable, Mapping
from typing import Any

from finetune.tasks.base import SPLITS, Pair, SplitName, Task, one_line
from finetune.tasks.pairs import Pairs, PairsOptions
from finetune.tasks.stdlib_summaries import StdlibSummaries, StdlibSummariesOptions
from pretrain.config import Section, choose

__all__ = ["REGISTRY", "SPLITS", "Pair", "SplitName", "Task", "build", "one_line"]

REGISTRY: dict[str, tuple[type[Section], Callable[..., Task]]] = {
    "stdlib-summaries": (StdlibSummariesOptions, StdlibSummaries),
    "pairs": (PairsOptions, Pairs),
}


def build(options: Mapping[str, Any]) -> Task:
    """The task that `options["name"]` names; raises ConfigError for an unknown name or option."""
    chosen, make = choose(REGISTRY, options, "task")
    return make(chosen)

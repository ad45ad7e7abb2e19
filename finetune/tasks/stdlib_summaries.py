"""The summary of a docstring from its rest: a task that ships inside every Python and needs no network.

A docstring of the standard library whose first paragraph is one line, followed by a blank line and more text,
gives a pair: the rest is the source, the first line the target. About 2,900 pairs; the number depends on the Python.
Pre-training on `stdlib-docs` has seen these texts, summaries included: the scores compare ways of decoding, they say
nothing of unseen text.
"""

from functools import cached_property
from typing import Literal

from finetune.tasks.base import Pair, Published, SplitName, TaskOptions, one_line, split_of
from pretrain.data.sources.stdlib_docs import stdlib_docstrings
from pretrain.errors import DataError

SUMMARY_WORDS = range(2, 33)
FEWEST_SOURCE_WORDS = 3
MOST_SOURCE_WORDS = 400
HELD_OUT_PERCENT = 10  # for validation, and again for test


class StdlibSummariesOptions(TaskOptions):
    """Nothing of its own: the pairs follow from the running Python."""

    name: Literal["stdlib-summaries"] = "stdlib-summaries"


class StdlibSummaries:
    """Rest of a docstring -> its first line."""

    name = "stdlib-summaries"
    metrics: tuple[str, ...] = ("rougeL", "rouge1", "rouge2", "bleu")
    published: Published | None = None

    def __init__(self, options: StdlibSummariesOptions) -> None:
        self.options = options

    def pairs(self, split: SplitName) -> list[Pair]:
        found = [pair for pair in self._all if split_of(pair.target, HELD_OUT_PERCENT) == split]
        if not found:
            raise DataError("task `stdlib-summaries` needs the source files of the standard library, found none")
        return found[: self.options.limit]

    @cached_property
    def _all(self) -> list[Pair]:
        made = (pair_of(text) for _, text in stdlib_docstrings())
        return list(dict.fromkeys(pair for pair in made if pair is not None))


def pair_of(docstring: str) -> Pair | None:
    """The pair of a docstring; None where it has no one-line summary, a part is too short or the rest repeats it."""
    first, blank, rest = docstring.strip().partition("\n\n")
    source, target = one_line(rest), one_line(first)
    words = source.split()
    if not blank or "\n" in first.strip():
        return None
    if len(target.split()) not in SUMMARY_WORDS or len(words) < FEWEST_SOURCE_WORDS or source.startswith(target):
        return None
    return Pair(" ".join(words[:MOST_SOURCE_WORDS]), target)

"""The first sentence of an article from what follows it: a summary of facts that any encyclopedia's text gives.

Articles are local text, a blank line after each, as `prepare`'s source `text` reads them, or a column of the hub.
Headings like `= Title =` are no part of an article, nor are brackets that extraction left empty. A hash of the sentence
decides the split, whatever the order of articles and files.
"""

import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Literal

from finetune.tasks.base import SPLITS, Pair, Published, SplitName, TaskOptions, split_of
from pretrain.data.sources import Source
from pretrain.data.text import clean, sentences
from pretrain.errors import ConfigError, DataError

SENTENCE_WORDS = range(5, 61)
FEWEST_SOURCE_WORDS, MOST_SOURCE_WORDS = 20, 400
HELD_OUT_PERCENT = 5  # for validation, and again for test
HEADING = re.compile(r"=.*=")
EMPTY_BRACKETS = re.compile(r"\s*\([\s,;]*\)")


class WikiFirstSentenceOptions(TaskOptions):
    """path: a glob of text files, or a folder of *.txt and *.txt.gz.

    hub: in its place `ID[/CONFIG][@REVISION][#FIELD]`, for example wikimedia/wikipedia/20231101.en; a whole Wikipedia
    does not fit into memory, so give `limit`.
    """

    name: Literal["wiki-first-sentence"] = "wiki-first-sentence"
    path: str | None = None
    hub: str | None = None


class WikiFirstSentence:
    """The text after the first sentence of an article -> that sentence."""

    name = "wiki-first-sentence"
    metrics: tuple[str, ...] = ("rougeL", "rouge1", "rouge2", "bleu", "repetition", "length_ratio")
    published: Published | None = None

    def __init__(self, options: WikiFirstSentenceOptions) -> None:
        self.options = options

    def pairs(self, split: SplitName) -> list[Pair]:
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[SplitName, list[Pair]]:
        limit, found = self.options.limit, {split: list[Pair]() for split in SPLITS}
        source = self._source()
        for article in source.documents(Counter()):
            pair = pair_of(article)
            if pair is None:
                continue
            mine = found[split_of(pair.target, HELD_OUT_PERCENT)]
            if limit is None or len(mine) < limit:
                mine.append(pair)
            elif all(len(pairs) == limit for pairs in found.values()):
                break
        if not found["train"]:
            raise DataError(f"`{source.argument}` must hold articles of several sentences, it holds none for training")
        return found

    def _source(self) -> Source:
        path, hub = self.options.path, self.options.hub
        if (path is None) == (hub is None):
            given = "neither" if path is None else "both"
            raise ConfigError(
                "task `wiki-first-sentence` must be given `task.path`, text files with a blank line after each article,"
                f" or `task.hub`, for example wikimedia/wikipedia/20231101.en, got {given}"
            )
        if hub is not None:
            return Source("wiki", "hf", hub)
        return Source("wiki", "text", f"{path}/*.txt*" if Path(path or "").is_dir() else str(path))


def pair_of(article: str) -> Pair | None:
    """The pair of an article; None where it is too short, or its first sentence too short or long."""
    found = (
        EMPTY_BRACKETS.sub("", sentence)
        for line in clean(article).split("\n")
        if not HEADING.fullmatch(line.strip())
        for sentence in sentences(line)
    )
    target = next(found, "")
    if len(target.split()) not in SENTENCE_WORDS:
        return None
    words: list[str] = []
    for sentence in found:
        if len(words) >= MOST_SOURCE_WORDS:
            break
        words += sentence.split()
    return Pair(" ".join(words[:MOST_SOURCE_WORDS]), target) if len(words) >= FEWEST_SOURCE_WORDS else None

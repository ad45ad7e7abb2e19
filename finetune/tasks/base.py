"""What a task is: pairs of one-line texts in three splits, and the metrics it is judged by."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pydantic import Field

from pretrain.config import Section
from pretrain.data.text import clean

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class Pair:
    """What the model reads and what it should write; each one line without outer white space."""

    source: str
    target: str


class TaskOptions(Section):
    """limit: at most so many pairs of each split, the first; for a first try."""

    limit: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Published:
    """What papers say of a set. pairs: of each split. target_words: the mean, in the tokens that the paper counts."""

    source: str
    pairs: Mapping[SplitName, int] = field(default_factory=dict)
    target_words: float | None = None


class Task(Protocol):
    """Pairs of text in fixed splits.

    name: in the registry. metrics: names in `finetune.scores.METRICS`, the most telling first. published: what papers
    say of the set, None where no paper has it.
    """

    name: str
    metrics: tuple[str, ...]
    published: Published | None

    def pairs(self, split: SplitName) -> list[Pair]:
        """The pairs of a split, the same in every call; a side may be empty.

        Raises:
            ConfigError, DataError: naming what is missing or broken.
        """
        ...


def one_line(text: str) -> str:
    """`text` cleaned as in pre-training, every run of white space one space."""
    return " ".join(clean(text).split())


def split_of(text: str, percent: int) -> SplitName:
    """The split of a pair by a hash of `text`: `percent` of all pairs each are for validation and test.

    Pairs with the same text are never on two sides.
    """
    drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    if drawn < percent:
        return "test"
    return "valid" if drawn < 2 * percent else "train"

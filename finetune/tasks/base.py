"""What a task is: pairs of one-line texts in three splits, and the metrics it is judged by."""

from dataclasses import dataclass
from typing import Literal, Protocol

from pretrain.data.text import clean

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class Pair:
    """What the model reads and what it should write; each one line without outer white space."""

    source: str
    target: str


class Task(Protocol):
    """Pairs of text in fixed splits.

    name: in the registry. metrics: names in `finetune.scores.METRICS`, the most telling first.
    """

    name: str
    metrics: tuple[str, ...]

    def pairs(self, split: SplitName) -> list[Pair]:
        """The pairs of a split, the same in every call; raises DataError naming what is missing or broken."""
        ...


def one_line(text: str) -> str:
    """`text` cleaned as in pre-training, every run of white space one space."""
    return " ".join(clean(text).split())

"""Items of question generation: lines with the same source are one question with several references.

As in eval_on_unilm_qg.py of GLGE: all is lower-cased; where sources are given, an item is keyed by its source line, and
the hypothesis of the last line with that source is the one that counts. Without sources every line is an item.
Hypotheses alone can have their tokens repaired before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune.scores.base import Texts
from finetune.scores.fix_tokenization import fix_tokenization


@dataclass
class Item:
    """One hypothesis and every reference of it, lower-cased."""

    hypothesis: str = ""
    references: list[str] = field(default_factory=list)


def merged(texts: Texts) -> list[Item]:
    """The items, in the order of their first lines."""
    keys: Sequence[str | int] = range(len(texts.references))
    if texts.sources is not None:
        keys = [source.strip().lower() for source in texts.sources]
    items: dict[str | int, Item] = {}
    for key, hypothesis, reference in zip(keys, texts.hypotheses, texts.references, strict=True):
        item = items.setdefault(key, Item())
        item.hypothesis = (fix_tokenization(hypothesis) if texts.fix_tokenization else hypothesis.strip()).lower()
        item.references.append(reference.strip().lower())
    return list(items.values())


def options_of(texts: Texts, items: Sequence[Item]) -> dict[str, str | int]:
    """What a signature says of the items."""
    said: dict[str, str | int] = {"hyp": "fix_tokenization"} if texts.fix_tokenization else {}
    return {**said, "case": "lc", "items": len(items), "key": "line" if texts.sources is None else "source"}

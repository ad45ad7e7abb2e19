"""What texts look like, whatever they say. Words stand between white space.

`repetition`: percent of words equal to the one before, of all words; the token repetition rate of JANUS, Table 3.
`length_ratio`: words of the hypotheses over words of the references; 1 is as long.
"""

from collections.abc import Sequence
from itertools import pairwise

from finetune.scores.base import OURS, Result, Texts

NAMES = ("repetition", "length_ratio")


def score(texts: Texts, names: Sequence[str]) -> dict[str, Result]:
    """The asked metrics, over all lines together."""
    return {name: Result(COMPUTED[name](texts), OURS, {"tok": "whitespace", "over": "corpus"}) for name in names}


def _repetition(texts: Texts) -> float:
    lines = [line.split() for line in texts.hypotheses]
    repeated = sum(word == before for words in lines for before, word in pairwise(words))
    return 100.0 * repeated / max(1, sum(map(len, lines)))


def _length_ratio(texts: Texts) -> float:
    return _words(texts.hypotheses) / _words(texts.references)


def _words(lines: Sequence[str]) -> int:
    return sum(len(line.split()) for line in lines)


COMPUTED = {"repetition": _repetition, "length_ratio": _length_ratio}

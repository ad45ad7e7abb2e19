"""What metrics are given and what they return."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

OURS = "parlance"
# References as sacrebleu takes them: in each stream a line, or None, for each hypothesis.
Streams = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Texts:
    """Line i of each belongs together. sources: None where not given. stemmer: Porter stems in ROUGE.

    fix_tokenization: items of question generation have their hypotheses repaired, see fix_tokenization.py.
    """

    hypotheses: Sequence[str]
    references: Sequence[str]
    sources: Sequence[str] | None = None
    stemmer: bool = True
    fix_tokenization: bool = False


@dataclass(frozen=True)
class Corpus:
    """What a corpus BLEU was computed on, to resample it.

    options: of sacrebleu's BLEU.
    """

    options: Mapping[str, Any]
    hypotheses: Sequence[str]
    references: Streams


@dataclass(frozen=True)
class Result:
    """A value and how it was computed.

    value: percent, or a ratio where the metric is one. library: the package that did the arithmetic. sentences: values
    whose mean `value` is, None where it is no mean. corpus: set where it is a corpus BLEU.
    """

    value: float
    library: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sentences: Sequence[float] | None = None
    corpus: Corpus | None = None

    @property
    def version(self) -> str:
        try:
            return importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:  # ours, run from a checkout that nobody installed
            return "not installed"

    @property
    def signature(self) -> str:
        """In the form of sacrebleu: library|option:value|...|version:..."""
        options = (f"{name}:{value}" for name, value in self.options.items())
        return "|".join([self.library, *options, f"version:{self.version}"])

    def to_json(self) -> dict[str, Any]:
        options = dict(self.options)
        return {"value": self.value, "library": self.library, "version": self.version, "options": options}


def mean_of(fractions: Sequence[float], library: str, **options: Any) -> Result:
    """The result of a metric that is the mean of sentence scores in [0, 1]."""
    percents = [100.0 * fraction for fraction in fractions]
    return Result(fmean(percents), library, options, sentences=percents)

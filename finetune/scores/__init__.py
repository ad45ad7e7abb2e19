"""Scores of texts against references: a family of metrics a file, and the registry of their names.

Packages that papers cite do the arithmetic; every value carries the package, its version and the options it was
computed with. Values are percent, but `length_ratio`, which is a ratio. A new metric is a function in the file of its
family, one line here and one test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.scores import bleu, coco, meteor, overall, personachat, rouge, surface
from finetune.scores.base import Result, Texts
from pretrain.errors import ConfigError, DataError

__all__ = ["FAMILIES", "METRICS", "Result", "Scores", "Texts", "score"]

Family = Callable[[Texts, Sequence[str]], Mapping[str, Result]]
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(bleu.NAMES, bleu.score),
    **dict.fromkeys(rouge.NAMES, rouge.score),
    **dict.fromkeys(coco.NAMES, coco.score),
    **dict.fromkeys(meteor.NAMES, meteor.score),
    **dict.fromkeys(personachat.NAMES, personachat.score),
    **dict.fromkeys(surface.NAMES, surface.score),
}
METRICS = (*FAMILIES, *overall.PARTS)
OF_ITEMS = (*coco.NAMES, *meteor.NAMES)  # question generation, see items.py


@dataclass(frozen=True)
class Scores:
    """results: {metric: Result}, in the order asked for. empty: lines without a word, of either side."""

    lines: int
    empty: Mapping[str, int]
    results: Mapping[str, Result]

    @property
    def values(self) -> dict[str, float]:
        return {name: result.value for name, result in self.results.items()}

    @property
    def signatures(self) -> dict[str, str]:
        return {name: result.signature for name, result in self.results.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "empty": dict(self.empty),
            "scores": self.values,
            "signatures": self.signatures,
            "metrics": {name: result.to_json() for name, result in self.results.items()},
        }


def score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[str],
    stemmer: bool = True,
    sources: Sequence[str] | None = None,
    fix_tokenization: bool = False,
) -> Scores:
    """Scores texts line by line: line i of each argument belongs together.

    Args:
        metrics: names in `METRICS`.
        stemmer: Porter stems in ROUGE, as in the scripts of summarisation papers.
        sources: for metrics that take lines with the same source as one item with several references.
        fix_tokenization: for the same metrics, which are those of question generation: repair hypotheses that are
            tokens of BERT-uncased, as GLGE does.

    Raises:
        DataError: different numbers of lines, or no word in the references.
        ConfigError: an unknown metric, one that needs what is not installed, or none that `fix_tokenization` is for.
    """
    if len(hypotheses) != len(references) or not references:
        raise DataError(
            f"hypotheses must have one line for each reference (at least 1), "
            f"got {len(hypotheses)} hypotheses and {len(references)} references"
        )
    if sources is not None and len(sources) != len(references):
        raise DataError(
            f"sources must have one line for each reference, "
            f"got {len(sources)} sources and {len(references)} references"
        )
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ConfigError(f"metric must be one of {', '.join(METRICS)}, got {unknown[0]!r}")
    sides = {"hypotheses": hypotheses, "references": references}
    empty = {side: sum(not line.strip() for line in lines) for side, lines in sides.items()}
    if empty["references"] == len(references):
        raise DataError(f"references must hold at least one word, all {len(references)} lines are empty")
    texts = Texts(hypotheses, references, sources, stemmer, fix_tokenization)
    needed = dict.fromkeys(part for name in metrics for part in overall.PARTS.get(name, (name,)))
    if fix_tokenization and not needed.keys() & set(OF_ITEMS):
        raise ConfigError(f"`fix_tokenization` is for {', '.join(OF_ITEMS)}, none of which is in {', '.join(needed)}")
    results: dict[str, Result] = {}
    for family in dict.fromkeys(FAMILIES[name] for name in needed):
        results |= family(texts, [name for name in needed if FAMILIES[name] is family])
    results |= {name: overall.combine(name, results) for name in metrics if name in overall.PARTS}
    return Scores(len(references), empty, {name: results[name] for name in metrics})

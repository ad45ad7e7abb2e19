"""Scores of hypotheses against references, computed by the packages that papers cite.

ROUGE: rouge-score, F1 of ROUGE-1, -2 and -L (longest common subsequence of the line), mean over lines, in percent.
`stemmer` applies the Porter stemmer to both sides; on by default, as in the evaluation scripts of summarisation
papers. BLEU: sacrebleu's corpus BLEU with its default settings, which the signature names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.errors import ConfigError, DataError


@dataclass(frozen=True)
class Scores:
    """values: {metric: percent}. signatures: {metric: how it was computed}."""

    lines: int
    values: dict[str, float] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"lines": self.lines, "scores": self.values, "signatures": self.signatures}


def score(hypotheses: Sequence[str], references: Sequence[str], metrics: Sequence[str], stemmer: bool = True) -> Scores:
    """Scores line by line pairs of texts.

    Raises:
        DataError: different numbers of lines, or none.
        ConfigError: an unknown metric.
    """
    if len(hypotheses) != len(references) or not references:
        raise DataError(
            f"hypotheses must have one line for each reference (at least 1), "
            f"got {len(hypotheses)} hypotheses and {len(references)} references"
        )
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ConfigError(f"metric must be one of {', '.join(METRICS)}, got {unknown[0]!r}")
    scores = Scores(len(references))
    for group in dict.fromkeys(METRICS[name] for name in metrics):
        mine = [name for name in metrics if METRICS[name] is group]
        values, signature = group(hypotheses, references, mine, stemmer)
        scores.values.update(values)
        scores.signatures.update(dict.fromkeys(mine, signature))
    ordered = {name: scores.values[name] for name in metrics}
    return Scores(scores.lines, ordered, scores.signatures)


def _rouge(
    hypotheses: Sequence[str], references: Sequence[str], names: Sequence[str], stemmer: bool
) -> tuple[Mapping[str, float], str]:
    from importlib.metadata import version

    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(names), use_stemmer=stemmer)
    totals = dict.fromkeys(names, 0.0)
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for name, value in scorer.score(reference, hypothesis).items():
            totals[name] += value.fmeasure
    signature = f"rouge-score:{version('rouge-score')}|F1|mean over lines|stemmer:{'porter' if stemmer else 'no'}"
    return {name: 100.0 * total / len(references) for name, total in totals.items()}, signature


def _bleu(
    hypotheses: Sequence[str], references: Sequence[str], names: Sequence[str], stemmer: bool
) -> tuple[Mapping[str, float], str]:
    from sacrebleu.metrics import BLEU

    bleu = BLEU()
    value = bleu.corpus_score(list(hypotheses), [list(references)]).score
    return {"bleu": value}, f"sacrebleu|{bleu.get_signature()}"


Group = Callable[[Sequence[str], Sequence[str], Sequence[str], bool], tuple[Mapping[str, float], str]]
METRICS: dict[str, Group] = {"rouge1": _rouge, "rouge2": _rouge, "rougeL": _rouge, "bleu": _bleu}

"""Paired bootstrap resampling (Koehn 2004): is a difference between two systems more than the choice of lines?

Lines are drawn with replacement, the same for both systems, and the difference d* of each draw is compared with the
measured one, d: p = (1 + draws with |d*| - mean |d*| > |d|) / (1 + draws), as Moses and sacrebleu have it. sacrebleu
resamples corpus BLEU, from its sufficient statistics; metrics that are means of sentences are resampled here. A metric
that is neither has no test. Systems that score alike on every line have p = 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.scores.base import OURS, Result

DRAWS = 1000
SEED = 12345  # sacrebleu's default


@dataclass(frozen=True)
class Paired:
    """p_value: of no difference between `value` and `against`."""

    value: float
    against: float
    p_value: float
    signature: str

    def to_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "against": self.against,
            "p_value": self.p_value,
            "signature": self.signature,
        }


def paired_bootstrap(ours: Mapping[str, Result], theirs: Mapping[str, Result]) -> dict[str, Paired]:
    """The test of each metric that has one; both sides were scored on the same lines with the same metrics."""
    tests = {}
    for name, result in ours.items():
        other = theirs[name]
        if result.corpus and other.corpus:
            p_value, said = _bleu(result, other)
        elif result.sentences is not None and other.sentences is not None:
            p_value, said = _means(result, other)
        else:
            continue
        tests[name] = Paired(result.value, other.value, p_value, said)
    return tests


def _bleu(ours: Result, theirs: Result) -> tuple[float, str]:
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    assert ours.corpus and theirs.corpus
    if list(ours.corpus.hypotheses) == list(theirs.corpus.hypotheses):
        return 1.0, "the same texts"
    systems = [("theirs", theirs.corpus.hypotheses), ("ours", ours.corpus.hypotheses)]
    metrics = {"BLEU": BLEU(**ours.corpus.options)}
    signatures, results = PairedTest(systems, metrics, ours.corpus.references, test_type="bs", n_samples=DRAWS)()
    tested: Any = results["BLEU"][1]
    return float(tested.p_value), f"sacrebleu|{signatures['BLEU']}"


def _means(ours: Result, theirs: Result) -> tuple[float, str]:
    import numpy as np

    assert ours.sentences is not None and theirs.sentences is not None
    differences = np.asarray(ours.sentences) - np.asarray(theirs.sentences)
    if not differences.any():
        return 1.0, "the same on every line"
    drawn = np.random.default_rng(SEED)
    count = len(differences)
    means = np.array([abs(differences[drawn.integers(count, size=count)].mean()) for _ in range(DRAWS)])
    beyond = int(np.sum(means - means.mean() > abs(differences.mean())))
    return (beyond + 1) / (DRAWS + 1), f"{OURS}|bs:{DRAWS}|seed:{SEED}"

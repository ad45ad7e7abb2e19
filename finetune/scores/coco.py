"""BLEU-4 and ROUGE-L as coco-caption computes them, for question generation (GLGE, after Du et al. 2017).

Words stand between white space. Both are computed over the items of `items.py`.

coco_bleu4: corpus BLEU, closest reference length, no smoothing, by sacrebleu. Where a 4-gram of the corpus is in its
references this is coco-caption's value. Where none is, it is 0, and there what the constants leave that keep it from
dividing by zero.

coco_rougeL: mean over items of (1 + b^2) P R / (R + b^2 P), b = 1.2, P and R each the highest over the references; the
longest common subsequence by rouge-score.
"""

from collections.abc import Sequence
from itertools import zip_longest

from finetune.scores.base import Result, Texts, mean_of
from finetune.scores.bleu import corpus_bleu
from finetune.scores.items import Item, merged, options_of

NAMES = ("coco_bleu4", "coco_rougeL")
BLEU4 = {"tokenize": "none", "force": True, "smooth_method": "none"}
BETA = 1.2


class Words:
    """What rouge-score calls a tokenizer: words between white space."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def score(texts: Texts, names: Sequence[str]) -> dict[str, Result]:
    """The asked metrics."""
    items = merged(texts)
    said = options_of(texts, items)
    results = {}
    if "coco_bleu4" in names:
        streams = list(zip_longest(*(item.references for item in items)))
        results["coco_bleu4"] = corpus_bleu([item.hypothesis for item in items], streams, BLEU4, said)
    if "coco_rougeL" in names:
        results["coco_rougeL"] = mean_of(rouge_l(items), "rouge-score", score=f"f{BETA}", average="items", **said)
    return results


def rouge_l(items: Sequence[Item]) -> list[float]:
    """ROUGE-L of each item, in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    values = []
    for item in items:
        scores = [scorer.score(reference, item.hypothesis)["rougeL"] for reference in item.references]
        precision, recall = max(s.precision for s in scores), max(s.recall for s in scores)
        below = recall + BETA**2 * precision
        values.append((1 + BETA**2) * precision * recall / below if below else 0.0)
    return values

"""The metrics of PersonaChat in GLGE, and the corpus BLEU that they are not.

`personachat_bleu1`, `personachat_bleu2`: mean of NLTK's sentence BLEU with smoothing method 7, weights (1, 0, 0, 0) and
(1/2, 1/2, 0, 0). Method 7 averages neighbouring orders: a text with one common word has BLEU-1 above 1/3, a perfect one
4/3. Values change with the version of NLTK, which the signature names; an arithmetic error counts 0, as in the script.
`personachat_corpus_bleu1`, `personachat_corpus_bleu`: corpus BLEU of orders 1 and 1-2, by sacrebleu, no smoothing.
`distinct1`, `distinct2`: distinct n-grams of all texts over all their n-grams, percent (Li et al. 2016).
Words stand between white space, case is kept.
"""

from collections.abc import Sequence

from finetune.scores.base import OURS, Result, Texts, mean_of
from finetune.scores.bleu import TOKENISED, corpus_bleu

WEIGHTS = {"personachat_bleu1": (1.0, 0.0, 0.0, 0.0), "personachat_bleu2": (0.5, 0.5, 0.0, 0.0)}
ORDERS = {"personachat_corpus_bleu1": 1, "personachat_corpus_bleu": 2}
DISTINCT = {"distinct1": 1, "distinct2": 2}
NAMES = (*WEIGHTS, *ORDERS, *DISTINCT)


def score(texts: Texts, names: Sequence[str]) -> dict[str, Result]:
    """The asked metrics."""
    results = {}
    for name in names:
        if name in WEIGHTS:
            results[name] = _sentence_bleu(texts, WEIGHTS[name])
        elif name in ORDERS:
            options = {**TOKENISED, "smooth_method": "none", "max_ngram_order": ORDERS[name]}
            results[name] = corpus_bleu(texts.hypotheses, [texts.references], options, {"order": ORDERS[name]})
        else:
            order = DISTINCT[name]
            results[name] = Result(100 * distinct(texts.hypotheses, order), OURS, {"order": order, "over": "corpus"})
    return results


def _sentence_bleu(texts: Texts, weights: tuple[float, ...]) -> Result:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method7
    values = []
    for hypothesis, reference in zip(texts.hypotheses, texts.references, strict=True):
        try:
            value = sentence_bleu([reference.split()], hypothesis.split(), weights, smoothing_function=smoothing)
        except (ArithmeticError, ValueError):
            value = 0.0
        values.append(float(value))
    said = ",".join(f"{weight:g}" for weight in weights)
    return mean_of(values, "nltk", smooth="method7", weights=said, average="lines", errors=0)


def distinct(lines: Sequence[str], order: int) -> float:
    """Distinct n-grams over all n-grams of `lines`, in [0, 1]; 0 where there is none."""
    grams: list[tuple[str, ...]] = []
    for line in lines:
        words = line.split()
        grams += zip(*(words[start:] for start in range(order)), strict=False)
    return len(set(grams)) / len(grams) if grams else 0.0

"""ROUGE F1 by rouge-score, mean over lines.

Words are lower-cased runs of a-z and 0-9; `stemmer` reduces those of more than three letters to their Porter stems,
as ROUGE-1.5.5 does with `-m`. `rougeL` takes a line as one sentence. `rougeLsum` is the ROUGE-L of ROUGE-1.5.5, the
union of longest common subsequences over sentences; as files2rouge has it, which scores XSum in GLGE, a sentence ends
at a full stop between spaces.
"""

from collections.abc import Sequence

from finetune.scores.base import Result, Texts, mean_of

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
END = " . "


def score(texts: Texts, names: Sequence[str]) -> dict[str, Result]:
    """ROUGE in the asked variants, all from one pass."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(names), use_stemmer=texts.stemmer)
    fractions: dict[str, list[float]] = {name: [] for name in names}
    for hypothesis, reference in zip(texts.hypotheses, texts.references, strict=True):
        # A line feed ends a sentence in rougeLsum and is white space to the others.
        for name, values in scorer.score(sentences(reference), sentences(hypothesis)).items():
            fractions[name].append(values.fmeasure)
    stemmer = "porter" if texts.stemmer else "no"
    return {
        name: mean_of(
            fractions[name],
            "rouge-score",
            score="f1",
            average="lines",
            stemmer=stemmer,
            **({"sentences": "' . '"} if name == "rougeLsum" else {}),
        )
        for name in names
    }


def sentences(line: str) -> str:
    """`line` with a line feed behind each sentence but the last."""
    return line.replace(END, " .\n")

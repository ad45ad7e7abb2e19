"""BLEU against mteval-v13a and sacrebleu's own test vectors; compounds against the perl substitution."""

import json
from pathlib import Path

import pytest

from finetune.scores import score
from finetune.scores.bleu import corpus_bleu, split_compounds
from finetune.tasks.pairs import read_lines


@pytest.mark.parametrize("system", ["newstest2017.KIT.4950.en-de", "newstest2017.PROMT-Rule-based.4735.en-de"])
def test_bleu_is_that_of_mteval(fixtures: Path, system: str) -> None:
    folder = fixtures / "sacrebleu" / "wmt17_en_de"
    expected = json.loads((folder / "expected.json").read_text())["MTEVAL"][system]
    hypotheses, references = read_lines(folder / f"{system}.gz"), read_lines(folder / "newstest2017.ref.de.gz")
    scores = score(hypotheses, references, ["bleu"])
    assert round(scores.values["bleu"], 2) == expected
    assert scores.lines == 3004 and "tok:13a" in scores.signatures["bleu"]


def test_bleu_is_that_of_the_test_vectors(fixtures: Path) -> None:
    cases = json.loads((fixtures / "sacrebleu" / "test_vectors.json").read_text())["test_bleu"][
        "test_corpus_bleu_cases"
    ]
    assert len(cases) >= 6
    for hypotheses, references, options, expected in cases:
        assert corpus_bleu(hypotheses, references, options).value == pytest.approx(expected, abs=1e-5), options


def test_variants_differ_in_what_they_are_named_for() -> None:
    hypotheses, references = ["The Rich-text format is old ."], ["the rich-text format is old."]
    scores = score(hypotheses, references, ["bleu", "bleu_lc", "bleu_tok", "bleu_compound"])
    assert scores.values["bleu_lc"] == pytest.approx(100)
    assert scores.values["bleu"] < 100
    # As tokenised texts `old .` and `old.` differ: the 1-grams in common are format and is.
    assert scores.values["bleu_tok"] < scores.values["bleu"]
    assert "tok:none" in scores.signatures["bleu_tok"] and "compounds:split" in scores.signatures["bleu_compound"]
    texts = ["a well-known rich-text format ."], ["a rich-text format ."]
    whole, split = (score(*texts, [name]).values[name] for name in ("bleu_tok", "bleu_compound"))
    by_hand = score(*map(split_compounds, texts), ["bleu_tok"]).values["bleu_tok"]
    assert split == by_hand and split > whole


def test_compounds_are_split_as_by_perl() -> None:
    """Expected: printf '...' | perl -ple 's{(\\S)-(\\S)}{$1 ##AT##-##AT## $2}g'."""
    given = ["rich-text format", "state-of-the-art", "a - b -c d-", "a-b-c", "x--y"]
    at = "##AT##-##AT##"
    made = [f"rich {at} text format", f"state {at} of {at} the {at} art", "a - b -c d-", f"a {at} b-c", f"x {at} -y"]
    assert split_compounds(given) == made

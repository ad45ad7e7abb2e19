"""NLTK's method 7 at its known values, and Distinct."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.scores import score
from finetune.scores.personachat import distinct

BOTH = ["personachat_bleu1", "personachat_bleu2"]


@pytest.mark.parametrize(
    ("hypothesis", "reference", "first", "second"),
    [
        ("a b c d e", "a b c d e", 4 / 3, 1.217161),
        ("i love to play basketball with my dog", "i like to play with my cat", 0.845238, 0.573067),
        ("yes", "yes sir", 0.367879, 0.212395),  # one word: an exception in NLTK 3.5
        ("x y", "a b", 0.0, 0.0),
        ("", "a b", 0.0, 0.0),
    ],
)
def test_sentence_bleu_is_that_of_nltk(hypothesis: str, reference: str, first: float, second: float) -> None:
    values = score([hypothesis], [reference], BOTH).values
    assert [values[name] / 100 for name in BOTH] == pytest.approx([first, second], abs=1e-6)


def test_it_is_a_mean_and_an_error_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from nltk.translate.bleu_score import SmoothingFunction

    scores = score(["a b c d e", "x y"], ["a b c d e", "a b"], BOTH)
    assert scores.values["personachat_bleu1"] == pytest.approx(100 * 2 / 3)
    assert "smooth:method7|weights:1,0,0,0" in scores.signatures["personachat_bleu1"]

    def fails(*_: object, **__: object) -> float:
        return 1 / 0

    monkeypatch.setattr(SmoothingFunction, "method7", fails)
    assert score(["a b"], ["a b"], BOTH).values == dict.fromkeys(BOTH, 0.0)


def test_corpus_bleu_is_another_number() -> None:
    """In common: 5 of 8 words (i to play with my) and 2 of 7 pairs (to play, with my)."""
    texts = ["i love to play basketball with my dog"], ["i like to play with my cat"]
    values = score(*texts, ["personachat_corpus_bleu1", "personachat_corpus_bleu"]).values
    assert values["personachat_corpus_bleu1"] == pytest.approx(100 * 5 / 8)
    assert values["personachat_corpus_bleu"] == pytest.approx(100 * math.sqrt(5 / 8 * 2 / 7))


def test_distinct_by_hand() -> None:
    """6 words of 9; pairs: i am, am here, i am, am i, i am -> 3 of 6 with `hi you`."""
    lines = ["i am here", "", "i am i am", "hi you"]
    values = score(lines, ["a"] * 4, ["distinct1", "distinct2"]).values
    assert values == pytest.approx({"distinct1": 100 * 5 / 9, "distinct2": 100 * 4 / 6})


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c"]), max_size=6), max_size=6), st.integers(1, 3))
def test_distinct_is_its_definition(lines: list[list[str]], order: int) -> None:
    grams = [" ".join(words[at : at + order]) for words in lines for at in range(len(words) - order + 1)]
    expected = len(set(grams)) / len(grams) if grams else 0.0
    assert distinct([" ".join(words) for words in lines], order) == expected

"""What all metrics share: corners, what a result tells of itself, and what is refused."""

import pytest

from finetune.scores import METRICS, score
from pretrain.errors import ConfigError, DataError

# Without the jar, which needs Java.
HERE = [name for name in METRICS if "meteor15" not in name]
LINES = ["the cat sat on the mat", "a dog barked at the cat"]
# What a text that equals its reference scores, where that is not 100.
PERFECT = {
    "personachat_bleu1": 100 * 4 / 3,
    "personachat_bleu2": 121.716124,
    "distinct1": 100 * 9 / 12,
    "distinct2": 100 * 9 / 10,
    "repetition": 0.0,
    "length_ratio": 1.0,
    # One chunk of six words: 1 - 0.5 / 6**3.
    "meteor": 100 * (1 - 0.5 / 216),
}


def test_perfect_texts() -> None:
    expected = {name: PERFECT.get(name, 100.0) for name in HERE}
    expected["overall_squad"] = (100 + 100 + PERFECT["meteor"]) / 3
    expected["overall_personachat"] = (
        sum(PERFECT[name] for name in ("personachat_bleu1", "personachat_bleu2", "distinct1", "distinct2")) / 4
    )
    assert score(LINES, LINES, HERE).values == pytest.approx(expected)


def test_empty_texts_score_nothing() -> None:
    scores = score(["", " "], LINES, HERE)
    assert scores.values == dict.fromkeys(HERE, 0.0)
    assert scores.empty == {"hypotheses": 2, "references": 0}


def test_an_empty_line_counts_as_a_line() -> None:
    some = score([LINES[0], ""], [LINES[0], ""], HERE)
    assert some.empty == {"hypotheses": 1, "references": 1}
    for name in ("rouge1", "rougeLsum", "coco_rougeL", "personachat_bleu1", "meteor"):
        whole = score(LINES[:1], LINES[:1], [name]).values[name]
        assert some.values[name] == pytest.approx(whole / 2), name
    for name in ("bleu", "coco_bleu4", "length_ratio"):
        assert some.values[name] == pytest.approx(score(LINES[:1], LINES[:1], [name]).values[name]), name


def test_a_result_tells_how_it_was_made() -> None:
    from importlib.metadata import version

    scores = score(LINES, LINES, ["rouge1", "bleu", "overall_personachat"], stemmer=False)
    assert list(scores.values) == ["rouge1", "bleu", "overall_personachat"]
    told = scores.to_json()
    assert told["metrics"]["rouge1"] == {
        "value": scores.values["rouge1"],
        "library": "rouge-score",
        "version": version("rouge-score"),
        "options": {"score": "f1", "average": "lines", "stemmer": "no"},
    }
    assert told["signatures"]["bleu"].startswith("sacrebleu|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    assert f"personachat_bleu1 (nltk {version('nltk')})" in told["signatures"]["overall_personachat"]
    assert "stemmer:porter" in score(LINES, LINES, ["rouge1"]).signatures["rouge1"]


def test_refusals() -> None:
    with pytest.raises(DataError, match="got 1 hypotheses and 2 references"):
        score(["a"], ["a", "b"], ["bleu"])
    with pytest.raises(DataError, match="got 0 hypotheses and 0 references"):
        score([], [], ["bleu"])
    with pytest.raises(DataError, match="got 1 sources and 2 references"):
        score(["a", "b"], ["a", "b"], ["bleu"], sources=["c"])
    with pytest.raises(DataError, match="all 2 lines are empty"):
        score(["a", "b"], ["", " "], ["length_ratio"])
    with pytest.raises(ConfigError, match="got 'bertscore'"):
        score(["a"], ["a"], ["bleu", "bertscore"])

"""METEOR by hand, and the jar where it is installed."""

import shutil
import sys

import pytest

from finetune.scores import score
from pretrain.errors import ConfigError


def meteor(hypothesis: str, reference: str) -> float:
    return score([hypothesis], [reference], ["meteor"]).values["meteor"]


def test_meteor_by_hand() -> None:
    """Lavie & Agarwal (2007): F = 10 P R / (R + 9 P), times 1 - 0.5 (chunks / matches)^3."""
    f = 10 * 1 * 0.75 / (0.75 + 9 * 1)
    assert meteor("The cat sat", "the cat sat on") == pytest.approx(100 * f * (1 - 0.5 / 27))
    assert meteor("sat the cat", "the cat sat") == pytest.approx(100 * (1 - 0.5 * (2 / 3) ** 3))
    assert meteor("a dog", "the cat") == 0.0


def test_stems_match_and_synonyms_do_not() -> None:
    """NLTK with WordNet would take big for large."""
    assert meteor("cats", "cat") == pytest.approx(50.0)
    assert meteor("big", "large") == 0.0


def test_the_jar_is_meteor_1_5() -> None:
    pytest.importorskip("pycocoevalcap.meteor.meteor", reason="pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("no Java")
    lines = ["what is your name ?", "where do you live ?"]
    scores = score(lines, lines, ["meteor15", "overall_squad_meteor15"])
    assert scores.values["meteor15"] == pytest.approx(100.0)
    assert scores.values["overall_squad_meteor15"] == pytest.approx(100.0)
    assert scores.signatures["meteor15"].startswith("pycocoevalcap|jar:meteor-1.5 -l en -norm|")
    # Paraphrases match here: synonyms are worth more than nothing, an empty text and field marks do no harm.
    assert 0 < score(["a big ||| house", ""], ["a large house", "a ||| b"], ["meteor15"]).values["meteor15"] < 100


def test_without_the_jar_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)
    with pytest.raises(ConfigError, match="`meteor15` needs pycocoevalcap, which is missing"):
        score(["a"], ["a"], ["meteor15"])

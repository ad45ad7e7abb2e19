"""Repetition and length."""

import pytest

from finetune.scores import score


def test_by_hand() -> None:
    """Repeated: the second and third `a`, the second `c`; neither across lines nor apart."""
    hypotheses, references = ["a a a b", "b c c a", ""], ["a b c", "a b", "a"]
    values = score(hypotheses, references, ["repetition", "length_ratio"]).values
    assert values == pytest.approx({"repetition": 100 * 3 / 8, "length_ratio": 8 / 6})

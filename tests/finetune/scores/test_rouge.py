"""ROUGE against ROUGE-1.5.5."""

import json
from pathlib import Path

import pytest

from finetune.scores import score
from finetune.scores.rouge import sentences
from finetune.tasks.pairs import read_lines


def test_rouge_is_that_of_rouge_1_5_5(fixtures: Path) -> None:
    expected = json.loads((fixtures / "rouge_google" / "expected.json").read_text())
    hypotheses = read_lines(fixtures / "rouge_google" / "prediction.txt")
    references = read_lines(fixtures / "rouge_google" / "target.txt")
    for line in (0, 1):
        plain = score([hypotheses[line]], [references[line]], ["rouge1", "rouge2", "rougeL"], stemmer=False)
        stemmed = score([hypotheses[line]], [references[line]], ["rouge1", "rouge2"])
        for name, value in plain.values.items():
            assert value == pytest.approx(100 * expected[f"line{line}"][name]["f"], abs=1e-2)
        for name, value in stemmed.values.items():
            assert value == pytest.approx(100 * expected[f"line{line}"][f"{name}_stem"]["f"], abs=1e-2)
    both = score(hypotheses, references, ["rouge1"], stemmer=False).values["rouge1"]
    means = [expected[f"line{line}"]["rouge1"]["f"] for line in (0, 1)]
    assert both == pytest.approx(100 * sum(means) / 2, abs=1e-2)


def test_sentences_of_a_summary_are_scored_together(fixtures: Path) -> None:
    """The files hold a sentence a line; one line with full stops between is what files2rouge is given."""
    folder = fixtures / "rouge_google"
    expected = json.loads((folder / "expected.json").read_text())
    sides = [" . ".join(read_lines(folder / f"{side}_multi.0.txt")) for side in ("prediction", "target")]
    assert score(sides[:1], sides[1:], ["rougeLsum"]).values["rougeLsum"] == pytest.approx(
        100 * expected["multi.0"]["rougeLsum_stem"]["f"], abs=1e-2
    )
    # Lin (2004), section 3.2.
    union = score(["w1 w2 w6 w7 w8 . w1 w3 w8 w9 w5"], ["w1 w2 w3 w4 w5"], ["rougeLsum"], stemmer=False)
    assert union.values["rougeLsum"] == pytest.approx(53.333, abs=1e-3)
    swapped = score(["w3 w4 . w1 w2 ."], ["w1 w2 . w3 w4 ."], ["rougeL", "rougeLsum"]).values
    assert swapped == pytest.approx({"rougeL": 50.0, "rougeLsum": 100.0})


def test_only_a_full_stop_between_spaces_ends_a_sentence() -> None:
    assert sentences("It is 3.5 a day . He left .") == "It is 3.5 a day .\nHe left ."
    assert sentences("One. Two") == "One. Two"

"""Scores against published values, and what is refused."""

import json
from pathlib import Path

import pytest

from finetune.score import METRICS, score
from finetune.tasks.pairs import read_lines
from pretrain.errors import ConfigError, DataError


@pytest.fixture
def fixtures(test_data: Path) -> Path:
    folder = test_data / "metric_fixtures"
    if not folder.is_dir():
        pytest.skip(f"no metric fixtures in {test_data}")
    return folder


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


@pytest.mark.parametrize("system", ["newstest2017.KIT.4950.en-de", "newstest2017.PROMT-Rule-based.4735.en-de"])
def test_bleu_is_that_of_mteval(fixtures: Path, system: str) -> None:
    folder = fixtures / "sacrebleu" / "wmt17_en_de"
    expected = json.loads((folder / "expected.json").read_text())["MTEVAL"][system]
    hypotheses, references = read_lines(folder / f"{system}.gz"), read_lines(folder / "newstest2017.ref.de.gz")
    scores = score(hypotheses, references, ["bleu"])
    assert round(scores.values["bleu"], 2) == expected
    assert scores.lines == 3004 and "tok:13a" in scores.signatures["bleu"]


def test_perfect_and_empty_texts() -> None:
    lines = ["the cat sat on the mat", "a dog barked at the cat"]
    assert score(lines, lines, list(METRICS)).values == pytest.approx(dict.fromkeys(METRICS, 100.0))
    assert score(["", ""], lines, list(METRICS)).values == pytest.approx(dict.fromkeys(METRICS, 0.0))
    assert "stemmer:no" in score(lines, lines, ["rouge1"], stemmer=False).signatures["rouge1"]


def test_refusals() -> None:
    with pytest.raises(DataError, match="got 1 hypotheses and 2 references"):
        score(["a"], ["a", "b"], ["bleu"])
    with pytest.raises(DataError, match="got 0 hypotheses and 0 references"):
        score([], [], ["bleu"])
    with pytest.raises(ConfigError, match="got 'meteor'"):
        score(["a"], ["a"], ["meteor"])

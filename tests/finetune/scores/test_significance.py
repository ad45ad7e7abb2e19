"""Paired bootstrap where the answer is known."""

from pathlib import Path

import numpy as np
import pytest

from finetune.scores import Result, score
from finetune.scores.significance import paired_bootstrap
from finetune.tasks.pairs import read_lines


def test_p_of_bleu(fixtures: Path) -> None:
    """2.2 points between real systems are no accident; ten lines of a system in another hardly make one."""
    folder = fixtures / "sacrebleu" / "wmt17_en_de"
    systems = ("KIT.4950", "uedin-nmt.4722")
    one, other = (read_lines(folder / f"newstest2017.{name}.en-de.gz")[:1500] for name in systems)
    references = read_lines(folder / "newstest2017.ref.de.gz")[:1500]
    sides = [score(texts, references, ["bleu"]).results for texts in (one, other, other[:10] + one[10:])]
    test = paired_bootstrap(sides[1], sides[0])["bleu"]
    assert test.p_value < 0.01 and test.value > test.against + 1
    assert "bs:1000|seed:12345" in test.signature and "tok:13a" in test.signature
    assert paired_bootstrap(sides[2], sides[0])["bleu"].p_value > 0.05


def of_sentences(values: np.ndarray) -> dict[str, Result]:
    return {"rouge1": Result(float(values.mean()), "none", sentences=values.tolist())}


def test_p_of_means_is_the_tail_of_a_normal() -> None:
    """The mean of n differences of deviation s has deviation s / sqrt(n): a difference of 2 of these has p 0.02."""
    noise = np.random.default_rng(0).normal(size=400)
    noise = (noise - noise.mean()) / noise.std()
    for deviations, expected in ((1.5, 0.067), (2.0, 0.023), (3.0, 0.0013)):
        test = paired_bootstrap(of_sentences(noise + deviations / 20), of_sentences(np.zeros(400)))["rouge1"]
        assert test.p_value == pytest.approx(expected, abs=0.012), deviations
        assert test == paired_bootstrap(of_sentences(noise + deviations / 20), of_sentences(np.zeros(400)))["rouge1"]


def test_the_same_system_and_metrics_without_a_test() -> None:
    lines = ["the cat sat on the mat", "a dog barked"]
    results = score(lines, lines, ["bleu", "rouge1", "distinct1"]).results
    tests = paired_bootstrap(results, results)
    assert {name: test.p_value for name, test in tests.items()} == {"bleu": 1.0, "rouge1": 1.0}


def test_merged_items_are_resampled_with_all_their_references() -> None:
    sources = [f"line {n // 2}" for n in range(40)]
    references = [f"who ran {n} ?" for n in range(40)]
    ours = [f"who ran {n - n % 2} ?" for n in range(40)]
    theirs = [f"where is {n} ?" for n in range(40)]
    names = ["coco_bleu4", "coco_rougeL", "meteor"]
    sides = [score(side, references, names, sources=sources).results for side in (ours, theirs)]
    tests = paired_bootstrap(*sides)
    assert set(tests) == set(names)
    assert all(test.p_value < 0.01 and test.value > test.against for test in tests.values())

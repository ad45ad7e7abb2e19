"""BLEU-4 and ROUGE-L of question generation: values by hand, merging of equal sources, coco-caption where installed."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.scores import Texts, score
from finetune.scores.coco import rouge_l
from finetune.scores.items import Item, merged

WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=8)


def test_rouge_l_by_hand() -> None:
    """In common: what is name ?, 4 words of 5 and of 7."""
    value = score(["What is your name ?"], ["what is the name of you ?"], ["coco_rougeL"]).values["coco_rougeL"]
    precision, recall = 4 / 5, 4 / 7
    assert value == pytest.approx(100 * 2.44 * precision * recall / (recall + 1.44 * precision))
    # Precision and recall are the best of any reference, and not of the same one: 2/3 of the first, 1/1 of the second.
    assert rouge_l([Item("a b c", ["a b", "a b c d e f"])]) == pytest.approx([2.44 * 1 * 1 / (1 + 1.44 * 1)])


def test_bleu4_by_hand() -> None:
    """Matches 5 of 6, 4 of 5, 3 of 4, 2 of 3; the reference is one word longer."""
    value = score(["a b c d e x"], ["a b c d e f g"], ["coco_bleu4"]).values["coco_bleu4"]
    assert value == pytest.approx(100 * 2.718281828 ** (1 - 7 / 6) * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert score(["a b c"], ["a b c d"], ["coco_bleu4"]).values["coco_bleu4"] == 0.0


def test_equal_sources_are_one_item() -> None:
    """Of two lines with one source the last hypothesis counts, against both references, the closer in length."""
    hypotheses = ["who ran ?", "WHO was it that ran away ?", "where is it now ?"]
    references = ["Who ran away ?", "who was it that left ?", "where is it ?"]
    sources = ["He ran . ", "he ran .", "It is here ."]
    items = merged(Texts(hypotheses, references, sources))
    assert items == [
        Item("who was it that ran away ?", ["who ran away ?", "who was it that left ?"]),
        Item("where is it now ?", ["where is it ?"]),
    ]
    names = ["coco_bleu4", "coco_rougeL", "meteor"]
    keyed, plain = (score(hypotheses, references, names, sources=given) for given in (sources, None))
    assert "items:2" in keyed.signatures["coco_bleu4"] and "key:source" in keyed.signatures["coco_bleu4"]
    assert "items:3" in plain.signatures["coco_bleu4"] and "key:line" in plain.signatures["meteor"]
    # n-grams in common and in all, item by item. The lengths closest to 7 and 5 are 6 and 4: no brevity penalty.
    matched = [(7 + 4, 7 + 5), (5 + 2, 6 + 4), (3 + 1, 5 + 3), (1 + 0, 4 + 2)]
    product = 1.0
    for correct, total in matched:
        product *= correct / total
    assert keyed.values["coco_bleu4"] == pytest.approx(100 * product**0.25)
    assert all(keyed.values[name] != plain.values[name] for name in names)


def longest(one: Sequence[str], other: Sequence[str]) -> int:
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + longest(one[1:], other[1:])
    return max(longest(one[1:], other), longest(one, other[1:]))


@settings(max_examples=40)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_rouge_l_is_its_definition(hypothesis: list[str], references: list[list[str]]) -> None:
    common = [longest(hypothesis, reference) for reference in references]
    precision = max(common) / len(hypothesis)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    expected = 2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0.0
    assert rouge_l([Item(" ".join(hypothesis), [" ".join(r) for r in references])]) == pytest.approx([expected])


@settings(max_examples=40)
@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_values_are_those_of_coco_caption(drawn: list[tuple[list[str], list[list[str]]]]) -> None:
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu", reason="pycocoevalcap is not installed")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    lines = [(str(n), " ".join(h), " ".join(r)) for n, (h, refs) in enumerate(drawn) for r in refs]
    sources, hypotheses, references = zip(*lines, strict=True)
    theirs = {number: [" ".join(h)] for number, (h, _) in enumerate(drawn)}
    gold = {number: [" ".join(r) for r in refs] for number, (_, refs) in enumerate(drawn)}
    ours = score(hypotheses, references, ["coco_bleu4", "coco_rougeL"], sources=sources).values
    assert ours["coco_rougeL"] == pytest.approx(100 * rouge.Rouge().compute_score(gold, theirs)[0])
    expected = 100 * bleu.Bleu(4).compute_score(gold, theirs, verbose=0)[0][3]
    if ours["coco_bleu4"]:
        assert ours["coco_bleu4"] == pytest.approx(expected, abs=1e-4)
    else:  # no 4-gram in common: there a remnant of constants
        assert expected < 5

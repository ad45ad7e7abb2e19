"""The pairs of each task, and how they become training samples."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from finetune import tasks
from finetune.corpus import PairCorpus
from finetune.tasks import SPLITS, Pair
from finetune.tasks.pairs import read_lines
from finetune.tasks.stdlib_summaries import pair_of
from pretrain.config import ModelConfig
from pretrain.data.tokenizer import train_bpe
from pretrain.errors import ConfigError, DataError
from pretrain.models import SpecialIds
from pretrain.objectives import build


def test_stdlib_summaries_statistics() -> None:
    task = tasks.build({"name": "stdlib-summaries"})
    pairs = {split: task.pairs(split) for split in SPLITS}
    total = sum(map(len, pairs.values()))
    assert 2000 < total < 4000  # varies with the Python version
    assert 0.75 < len(pairs["train"]) / total < 0.85
    assert pairs == {split: tasks.build({"name": "stdlib-summaries"}).pairs(split) for split in SPLITS}
    targets = {split: {pair.target for pair in found} for split, found in pairs.items()}
    assert not targets["train"] & targets["test"] and not targets["train"] & targets["valid"]
    everything = [pair for found in pairs.values() for pair in found]
    assert len(set(everything)) == total
    assert all("\n" not in pair.source + pair.target for pair in everything)
    assert not any(pair.source.startswith(pair.target) for pair in everything)
    assert 5 < np.mean([len(pair.target.split()) for pair in everything]) < 12


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Sum the\tnumbers.\n\nMore than\none   line here.", Pair("More than one line here.", "Sum the numbers.")),
        ("Two lines of\nsummary.\n\nMore than one line.", None),
        ("Only a summary.", None),
        ("Summary without a blank line.\nMore than one line.", None),
        ("Constructor.\n\nMore than one line.", None),
        ("A fine summary.\n\nToo short.", None),
        ("A fine summary.\n\nA fine summary. And more of it.", None),
    ],
)
def test_pair_of_a_docstring(docstring: str, expected: Pair | None) -> None:
    assert pair_of(docstring) == expected


def test_local_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("one  two\tthree\nform\x0cfeed\tfour\n", encoding="utf-8")
    (tmp_path / "b.src").write_text("x y\r\nz", encoding="utf-8")
    (tmp_path / "b.tgt.gz").write_bytes(gzip.compress(b"p\nq\n"))
    options = {"train": str(tmp_path / "a.tsv"), "valid": [str(tmp_path / "b.src"), str(tmp_path / "b.tgt.gz")]}
    task = tasks.build({"name": "pairs", **options})
    assert task.pairs("train") == [Pair("one two", "three"), Pair("form feed", "four")]
    assert task.pairs("valid") == [Pair("x y", "p"), Pair("z", "q")]
    assert task.pairs("test") == []


def test_bad_local_pairs(tmp_path: Path) -> None:
    def pairs(content: str) -> list[Pair]:
        (tmp_path / "bad.tsv").write_text(content, encoding="utf-8")
        return tasks.build({"name": "pairs", "train": str(tmp_path / "bad.tsv")}).pairs("train")

    with pytest.raises(DataError, match="line 2 must be source, a tab and target, got 0 tabs"):
        pairs("a\tb\nno tab\n")
    with pytest.raises(DataError, match="got 2 tabs"):
        pairs("a\tb\tc\n")
    with pytest.raises(DataError, match="at least one pair"):
        pairs("")
    two = [str(tmp_path / "bad.tsv"), str(tmp_path / "other")]
    (tmp_path / "bad.tsv").write_text("a\nb\n")
    (tmp_path / "other").write_text("a\n")
    with pytest.raises(DataError, match="2, it has 1"):
        tasks.build({"name": "pairs", "train": two}).pairs("train")
    (tmp_path / "other").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_lines(two[1])
    with pytest.raises(ConfigError, match=r"must be one of xsum, .*pairs, got 'pears'"):
        tasks.build({"name": "pears"})


def test_pairs_become_examples() -> None:
    tokenizer = train_bpe(["hello world"], 270)
    ids = SpecialIds(tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.mask, tokenizer.unk)
    pairs = [Pair("hello <mask>", "world"), Pair("abcdefghij" * 4, "xy"), Pair("long target", "0123456789" * 3)]
    corpus = PairCorpus(pairs, tokenizer, ids, max_source=20, max_target=24)
    assert (corpus.sizes, corpus.cut, corpus.left_out, corpus.empty) == ([2], 1, 1, 0)
    empty = [Pair("", "x"), Pair("x", ""), Pair("", "")]
    beside = PairCorpus(empty[:1] + pairs + empty[1:], tokenizer, ids, max_source=20, max_target=24)
    assert (beside.sizes, beside.cut, beside.left_out, beside.empty) == ([2], 1, 1, 3)
    with pytest.raises(DataError, match="a source and a target of at most 24 tokens, none of 3 has"):
        PairCorpus(empty, tokenizer, ids, max_source=20, max_target=24)
    objective = build({"name": "cmlm"}, ids, None, ModelConfig(length_classes=32))
    first, second = (corpus.example(0, index, np.random.default_rng(0), objective) for index in (0, 1))
    assert tokenizer.decode(first.source) == "hello <mask>" and ids.mask not in first.source
    assert tokenizer.decode(first.target) == "world"
    assert first.target[[0, -1]].tolist() == [ids.bos, ids.eos]
    assert len(second.source) == corpus.length(0, 1) == corpus.longest == 20
    with pytest.raises(DataError, match="at most 3 tokens, none of 3"):
        PairCorpus(pairs, tokenizer, ids, max_source=20, max_target=3)

"""`stats`: its figures against counts by hand, its table and its JSON."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.__main__ import main
from finetune.stats import measure, table
from finetune.tasks import Pair, Published


def test_measure() -> None:
    pairs = [Pair("a b c", "a"), Pair("", "x y"), Pair("same text", "same text"), Pair("d", "")]
    assert measure(pairs) == {
        "pairs": 4, "source_words": 6 / 4, "target_words": 5 / 4, "empty": 0.5, "identical": 0.25,
    }  # fmt: skip


texts = st.sampled_from(["", "a", "a b"])


@given(st.lists(st.builds(Pair, texts, texts), min_size=1))
def test_measure_of_twice_the_pairs(pairs: list[Pair]) -> None:
    once, twice = measure(pairs), measure(pairs * 2)
    assert twice == {**once, "pairs": 2 * len(pairs)}
    assert 0 <= once["empty"] <= 1 and 0 <= once["identical"] <= 1


def test_a_table_has_a_row_for_what_only_the_paper_has() -> None:
    here = {"pairs": 1234, "source_words": 9.96, "target_words": 2.0, "empty": 0.125, "identical": 0.0}
    head, train, valid, source = table({"train": here}, Published("them", {"train": 1300, "valid": 10}, 21.1))
    assert len(head) == len(train) == len(valid) and source == "paper: them"
    assert train.split() == ["train", "1,234", "1,300", "10.0", "2.0", "21.1", "12.50%", "0.00%"]
    assert valid.split() == ["valid", "-", "10", "-", "-", "21.1", "-", "-"]
    assert len(table({"train": here}, None)) == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, number in (("dev", 2), ("test", 3)):
        (tmp_path / f"{split}.src").write_text("one two\n" * number)
        (tmp_path / f"{split}.tgt").write_text("one\n" * number)
    assert main(["stats", "xsum", f"task.path={tmp_path}"]) == 0
    told = capsys.readouterr()
    assert "no files of split train" in told.err and "204,045" in told.out and "ELMER, table 5" in told.out
    assert main(["stats", "xsum", f"task.path={tmp_path}", "task.limit=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "xsum" and found["published"]["pairs"]["train"] == 204_045
    assert {split: row["pairs"] for split, row in found["splits"].items()} == {"valid": 2, "test": 2}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["xsun"], 3, "must be one of xsum, squad-qg"),
        (["xsum"], 3, "got neither"),
        (["xsum", "task.path=/nowhere"], 4, "must be a folder"),
        (["xsum", "task.pth=x"], 3, "did you mean `path`"),
        (["xsum", "seed=1"], 3, "must look like task.KEY=VALUE"),
    ],
)
def test_bad_input(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", *arguments]) == code
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and not told.out

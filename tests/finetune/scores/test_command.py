"""`score` on files: names, sources, another system, JSON, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest

from finetune.__main__ import main

TEXTS = {
    "hyp": ["who ran ?", "who was it ?", "where is it now ?", "the the end"],
    "other": ["x", "y", "z", "w"],
    "ref": ["who ran ?", "who was that ?", "where is it ?", "the end"],
    "src": ["he ran .", "He ran .", "it is here .", "it ended ."],
    "short": ["a"],
    "blank": ["", "who was it ?", "where is it now ?", "the the end"],
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for name, lines in TEXTS.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {name: str(tmp_path / name) for name in TEXTS}


def score(files: dict[str, str], *more: str, hyp: str = "hyp") -> int:
    return main(["score", "--hyp", files[hyp], "--ref", files["ref"], *(files.get(word, word) for word in more)])


def test_metrics_come_after_those_of_the_task(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert score(files, "--task", "stdlib-summaries", "--metrics", "repetition, bleu,length_ratio", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["scores"]) == ["rougeL", "rouge1", "rouge2", "bleu", "repetition", "length_ratio"]
    assert told["scores"]["repetition"] == pytest.approx(100 / 15) and told["lines"] == 4
    assert told["metrics"]["bleu"]["library"] == "sacrebleu" and "against" not in told


def test_sources_merge_lines(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert score(files, "--metrics", "coco_rougeL", "--src", "src") == 0
    assert "items:3|key:source" in capsys.readouterr().out


def test_another_system_beside_it(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert score(files, "--metrics", "rouge1,distinct1", "--against", "other") == 0
    head, rouge, distinct = capsys.readouterr().out.splitlines()
    assert head.split() == ["value", "against", "p"]
    assert rouge.split()[0] == "rouge1" and float(rouge.split()[2]) == 0.0 and float(rouge.split()[3]) < 0.01
    assert "seed:12345" in rouge and "no test" in distinct
    assert score(files, "--metrics", "rouge1,distinct1", "--against", "other", "--json") == 0
    told = json.loads(capsys.readouterr().out)["against"]
    assert set(told) == {"rouge1"} and told["rouge1"]["against"] == 0.0


def test_empty_lines_are_counted(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert score(files, "--metrics", "bleu", hyp="blank") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "empty: 1 of 4 hypotheses"


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ((), 2, "`--task` or `--metrics`, got neither"),
        (("--metrics", "bleu,"), 3, "got ''"),
        (("--metrics", "bleu", "--against", "short"), 4, "/short` must have as many lines as `"),
        (("--metrics", "bleu", "--src", "short"), 4, "/ref`, 4, it has 1"),
        (("--metrics", "distinct1", "--against", "other"), 3, "distinct1 have none"),
    ],
)
def test_refusals(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], more: tuple[str, ...], code: int, message: str
) -> None:
    assert score(files, *more) == code
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "/none` must be a UTF-8 text file: No such file or directory\n"),
        ("folder", "", "/folder` must be a UTF-8 text file: Is a directory\n"),
        ("latin", b"caf\xe9\n", "/latin` must be a UTF-8 text file: 'utf-8' codec can't decode"),
        ("bad.gz", b"plain", "/bad.gz` must be a UTF-8 text file: Not a gzipped file"),
        (
            "broken.gz",
            gzip.compress(b"one two", mtime=0)[:10] + b"\xff" * 20,
            "/broken.gz` must be a UTF-8 text file: Error -3",
        ),
        ("short", b"a\n", "/short` must have as many lines as `"),
    ],
)
def test_files_that_cannot_be_scored(
    tmp_path: Path, files: dict[str, str], name: str, content: bytes | str | None, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
    assert main(["score", "--metrics", "bleu", "--hyp", str(path), "--ref", files["ref"]]) == 4
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: `") and error.count("\n") == 1

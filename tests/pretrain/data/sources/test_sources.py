"""Sources: the built-in documentation, local text, and one-line errors for what a first user gets wrong."""

import gzip
import sys
from pathlib import Path

import pytest

from pretrain.data.sources import parse_source, parse_sources
from pretrain.data.sources import text_files as module
from pretrain.data.sources.stdlib_docs import stdlib_docstrings, stdlib_topics
from pretrain.errors import DataError


def test_stdlib_docs_are_large_clean_and_read_without_imports() -> None:
    before = set(sys.modules)
    pairs = list(stdlib_docstrings())
    topics = list(stdlib_topics())
    assert not {"antigravity", "idlelib", "turtle", "pydoc_data"} & (set(sys.modules) - before)
    texts = [text for _, text in pairs]
    assert len(texts) == len(set(texts)) > 5000 and all(text.strip() == text != "" for text in texts)
    assert sum(len(text.split()) for _, text in pairs + topics) > 250_000
    names = dict(pairs)
    assert "json" in names and names["textwrap.dedent"].startswith("Remove any common leading whitespace")
    assert not any(name.startswith("test.") for name in names)
    assert pairs == list(stdlib_docstrings())


def test_blank_lines_separate_documents_and_gz_is_the_same(tmp_path: Path) -> None:
    text = "first\nline\n\n \t\nsecond\n\n\n"
    (tmp_path / "b.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt").write_text("")
    source = parse_source(f"x=text:{tmp_path}/*.txt*")
    assert list(source.documents()) == ["first\nline\n", "second\n"] * 2
    (tmp_path / "long.gz").write_bytes(gzip.compress(b"words " * 5000))
    assert parse_source(f"x=text:{tmp_path}/long.gz").text_bytes() == 30_000
    whole = parse_source(f"x=text-file:{tmp_path}/*.txt*")
    assert list(whole.documents()) == [text, text]


def test_bytes_that_are_no_utf8_do_not_stop(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ok \xff\xfe bad\n")
    assert list(parse_source(f"x=text:{tmp_path}/a").documents()) == ["ok \ufffd\ufffd bad\n"]


def test_enormous_documents_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DOCUMENT_CHARACTERS", 10)
    (tmp_path / "a").write_text("x" * 25 + "\n" + "y" * 5 + "\n" + "z" * 4)
    for kind in ("text", "text-file"):
        pieces = list(parse_source(f"x={kind}:{tmp_path}/a").documents())
        assert all(len(piece) <= 10 for piece in pieces)
        assert "".join(pieces) == "x" * 25 + "\n" + "y" * 5 + "\n" + "z" * 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stdlib-doc", "did you mean `stdlib-docs`"),
        ("x=txt:*.txt", "did you mean `text`"),
        ("text:*.txt", "must look like NAME=text:GLOB"),
        ("x=text:", "must look like NAME=text:GLOB"),
        ("../x=text:a", "name must be"),
        ("a.b=text:a", "name must be"),
        ("stdlib-docs:3", "takes no"),
        ("", "unknown kind"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_source(spec)
    assert "\n" not in str(caught.value)


def test_missing_files_and_doubled_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt"):
        list(parse_source(f"x=text:{tmp_path}/nothing.txt").documents())
    with pytest.raises(DataError, match="`x` comes 2 times"):
        parse_sources(["x=text:a", "x=text:b"])
    with pytest.raises(DataError, match="at least one"):
        parse_sources([])


@pytest.mark.parametrize("content", [b"not gzip at all", gzip.compress(b"words " * 5000)[:-30]], ids=["no gzip", "cut"])
def test_damaged_gz_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.gz"):
        list(parse_source(f"x=text:{tmp_path}/bad.gz").documents())


def test_a_file_with_several_names_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document")
    (tmp_path / "b.txt").symlink_to("a.txt")
    (tmp_path / "again").symlink_to(".")
    assert list(parse_source(f"x=text:{tmp_path}/**/*.txt").documents()) == ["one document"]

"""Sources of records and members: the same documents in every kind, named and counted losses, damage that is told."""

import gzip
import io
import json
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pretrain.data.dataset import ShardDataset
from pretrain.data.prepare import prepare
from pretrain.data.sources import parse_source, read_specs, record_files, tar_files
from pretrain.errors import ConfigError, DataError
from pretrain.parsing import read_yaml


def read(spec: str) -> tuple[list[str], dict[str, int]]:
    skipped = Counter[str]()
    return list(parse_source(spec).documents(skipped)), dict(skipped)


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# ------------------------------------------------------------------------------------------------------------- jsonl


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        '{"text": "one", "title": "t1"}',
        "",
        "   ",
        "not json",
        '{"title": "no text here"}',
        '{"text": 7}',
        '["text"]',
        "[" * 100_000,
        '{"text": "two\\nlines \\ud800 \\u0000"}',
        '{"text": ""}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    documents, skipped = read(f"x=jsonl:{tmp_path}/*.jsonl*")
    assert documents == ["one", "two\nlines \ud800 \0", "", "three"]
    assert skipped == {"not JSON": 2, "no text in `text`": 3}
    assert read(f"x=jsonl:{tmp_path}/a.jsonl#title")[0] == ["t1", "no text here"]


def test_an_endless_line_is_left_out_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_files, "MAX_RECORD_CHARACTERS", 64)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 1000}) + '\n{"text": "short"}\n' + "y" * 64)
    documents, skipped = read(f"x=jsonl:{tmp_path}/a.jsonl")
    assert documents == ["short"] and skipped == {"longer than 64 characters": 2}


def test_damaged_jsonl_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n' * 1000)[:-12])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz` cannot be read"):
        read(f"x=jsonl:{tmp_path}/a.jsonl.gz")


# ----------------------------------------------------------------------------------------------------------- parquet


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(kind: pyarrow.DataType, tmp_path: Path) -> None:
    column = pyarrow.array(["eins", None, "", "ζ\0"], kind)
    parquet.write_table(pyarrow.table({"text": column, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert read(f"x=parquet:{tmp_path}/a.parquet") == (["eins", "", "ζ\0"], {"no `text`": 1})
    for field, named in (("n", "`n` of strings, it has text"), ("body", "`body` of strings")):
        with pytest.raises(DataError, match=named):
            read(f"x=parquet:{tmp_path}/a.parquet#{field}")


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["words"] * 500}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (b"", b"PAR1", whole[:-9], whole[:40] + bytes(60) + whole[100:]):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet` cannot be read"):
            read(f"x=parquet:{tmp_path}/a.parquet")


def test_parquet_strings_that_are_no_utf8(tmp_path: Path) -> None:
    binary = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(2, *binary.buffers()[1:])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet` cannot be read"):
        read(f"x=parquet:{tmp_path}/a.parquet")


# -------------------------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_webdataset(suffix: str, tmp_path: Path) -> None:
    members = [
        ("0.txt", "über".encode()),
        ("0.jpg", b"\xff\xd8"),
        ("1.json", b'{"text": "eins", "body": "zwei"}'),
        ("2.json", b"{"),
        ("3.json", b'{"body": "drei"}'),
        ("4.pkl", b"cos\nsystem\n"),
        ("sub/5.txt", b"no utf8: \xff"),
        ("../6.txt", b"outside"),
        ("/7.txt", b"outside"),
    ]
    write_tar(tmp_path / f"a.{suffix}", members, "w:gz" if suffix.endswith("gz") else "w")
    documents, skipped = read(f"x=webdataset:{tmp_path}/a.{suffix}")
    assert documents == ["über", "eins", "no utf8: \ufffd"]
    assert skipped == {
        "`.jpg` members": 1, "`.pkl` members": 1, "not JSON": 1, "no text in `text`": 1,
        "a name that leads outside": 2,
    }  # fmt: skip
    assert read(f"x=webdataset:{tmp_path}/a.{suffix}#body")[0][1:3] == ["zwei", "drei"]


def test_links_and_devices_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("a.txt")
            member.type, member.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(member)
    assert read(f"x=webdataset:{tmp_path}/a.tar") == ([], {"not a plain file": 4})


def test_a_header_larger_than_any_name_is_refused_unread(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.txt")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(DataError, match=r"a\.tar` cannot be read: a header of 1099511627776 bytes"):
        read(f"x=webdataset:{tmp_path}/a.tar")


@pytest.mark.parametrize("cut", [700, 1024 + 100])
def test_a_tar_that_is_cut_short_is_named(cut: int, tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"words " * 100) for n in range(3)]).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r"a\.tar` cannot be read"):
        read(f"x=webdataset:{tmp_path}/a.tar")


def test_no_tar_at_all_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"once upon a time " * 100)
    with pytest.raises(DataError, match=r"a\.tar` cannot be read"):
        read(f"x=webdataset:{tmp_path}/a.tar")


def test_many_members_do_not_fill_memory(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"one") for n in range(4000)])
    documents = parse_source(f"x=webdataset:{tmp_path}/a.tar").documents()
    for _ in range(500):
        next(documents)
    tracemalloc.start()
    assert sum(1 for _ in documents) == 3500
    grown = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert grown < 300_000  # remembered members take 500 bytes each and more


def test_an_enormous_member_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_files, "MAX_DOCUMENT_CHARACTERS", 10)
    monkeypatch.setattr(tar_files, "MAX_RECORD_CHARACTERS", 10)
    write_tar(tmp_path / "a.tar", [("0.txt", b"x" * 25), ("1.json", b'{"text": "too long"}')])
    documents, skipped = read(f"x=webdataset:{tmp_path}/a.tar")
    assert documents == ["x" * 10, "x" * 10, "x" * 5] and skipped == {"longer than 10 characters": 1}


# ---------------------------------------------------------------------------------------------------- all of them


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)  # tars and Parquet hold no lone surrogates


@settings(max_examples=25)
@given(st.lists(TEXTS, max_size=8))
def test_every_kind_gives_the_same_documents(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> None:
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    parquet.write_table(pyarrow.table({"text": pyarrow.array(documents, pyarrow.string())}), folder / "a.parquet")
    write_tar(folder / "a.tar", [(f"{n}.txt", text.encode()) for n, text in enumerate(documents)])
    assert read(f"x=jsonl:{folder}/a.jsonl") == (documents, {})
    assert read(f"x=parquet:{folder}/a.parquet") == (documents, {})
    assert read(f"x=webdataset:{folder}/a.tar") == ([text for text in documents if text], {})


def test_every_kind_gives_the_same_shards(tmp_path: Path) -> None:
    documents = [f"Document {n} says one thing. Then it says another one." for n in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
    write_tar(tmp_path / "a.wds", [(f"{n}.txt", text.encode()) for n, text in enumerate(documents)])
    found = {}
    for kind, name in (("text", "txt"), ("jsonl", "jsonl"), ("parquet", "parquet"), ("webdataset", "wds")):
        prepare(tmp_path / kind, [f"x={kind}:{tmp_path}/a.{name}"], train_vocab=300, max_length=64)
        dataset = ShardDataset(tmp_path / kind)
        found[kind] = [shard.sha256 for shard in dataset.manifest.shards]
        assert np.array_equal(dataset.lengths, ShardDataset(tmp_path / "text").lengths)
    assert len({tuple(hashes) for hashes in found.values()}) == 1


def test_what_is_left_out_is_counted_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = ['{"text": "A long enough document is here to be kept."}'] * 20 + ["{", '{"text": "no"}', '{"x": 1}'] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    manifest = prepare(tmp_path / "out", [f"x=jsonl:{tmp_path}/a.jsonl"], train_vocab=300, max_length=64)
    left_out = {"no text in `text`": 2, "not JSON": 2, "shorter than 4 tokens": 2}
    assert manifest.sources[0].skipped == left_out
    assert "source x: left out 2 no text in `text`, 2 not JSON, 2 shorter than 4 tokens" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------- YAML of them


def test_a_file_of_sources(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("one: text:a/*.txt\ntwo: stdlib-docs\n")
    assert read_specs(tmp_path / "s.yaml") == ["one=text:a/*.txt", "two=stdlib-docs"]
    for content in ("one: {text: a}", "1: text:a", "[one]"):
        (tmp_path / "s.yaml").write_text(content)
        with pytest.raises(ConfigError):
            read_specs(tmp_path / "s.yaml")


def test_the_published_sources_are_the_hub_at_a_commit_or_a_branch() -> None:
    file = Path(__file__).resolve().parents[4] / "configs" / "data" / "wikipedia_books.yaml"
    sources = {spec.partition("=")[0]: parse_source(spec) for spec in read_specs(file)}
    assert list(sources) == list(read_yaml(file)) and {source.kind for source in sources.values()} == {"hf"}
    assert sources["wikipedia"].pinned() == sources["wikipedia"]  # asks nobody: it names a commit

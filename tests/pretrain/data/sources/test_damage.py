"""Damaged and forged files: no document is lost in silence, nothing hangs, nothing but one-line errors comes out."""

import bz2
import gzip
import io
import json
import lzma
import random
import signal
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pretrain.data import sources as module
from pretrain.data.sources import MAX_REASONS, OTHER_REASONS, parse_source, tar_files
from pretrain.errors import DataError

DOCUMENTS = [f"Document {number} is here." for number in range(4)]
COMPRESSIONS = {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read(path: Path, kind: str = "webdataset") -> tuple[list[str], dict[str, int]]:
    skipped = Counter[str]()
    return list(parse_source(f"x={kind}:{path}").documents(skipped)), dict(skipped)


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    """One member as it lies in a tar; `size` is what its header claims."""
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, len(content) if size is None else size
    return header.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def pax(kind: bytes = tarfile.XHDTYPE, **records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        body = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(body) + len(str(len(body) + 2))
        lines += f"{length}".encode() + body
    return member("header", lines, kind)


END = bytes(1024)
HONEST = b"".join(member(f"{number}.txt", text.encode()) for number, text in enumerate(DOCUMENTS))


def refused(path: Path, content: bytes, reason: str, kind: str = "webdataset") -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read(path, kind)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_tar_cut_anywhere_is_an_error(compression: str, tmp_path: Path) -> None:
    """Above all between two members, where a cut tar looks like a shorter one."""
    whole = COMPRESSIONS[compression](HONEST + END)
    cuts = range(0, len(HONEST), 128) if compression == "tar" else range(0, len(whole), 3)
    for cut in cuts:
        refused(tmp_path / "a.tar", whole[:cut], "cannot be read")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_compressed_stream_of_several_is_read(compression: str, tmp_path: Path) -> None:
    compress = COMPRESSIONS[compression]
    for at in (512, 700, 1024):
        (tmp_path / "a.tar").write_bytes(compress(HONEST[:at]) + compress(HONEST[at:] + END))
        assert read(tmp_path / "a.tar") == (DOCUMENTS, {})


@pytest.mark.parametrize("compression", ["tar", "gz", "xz"])
def test_a_flipped_bit_loses_no_document(compression: str, tmp_path: Path) -> None:
    """In any header of a tar, or anywhere in a compressed one."""
    whole = COMPRESSIONS[compression](HONEST + END)
    bits = random.Random(0)
    places = [1024 + at for at in range(512)] if compression == "tar" else range(len(whole))
    told = 0
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << bits.randrange(8)
        (tmp_path / "a.tar").write_bytes(content)
        try:
            assert read(tmp_path / "a.tar") == (DOCUMENTS, {})  # a bit that means nothing, such as the date in gzip
        except DataError as error:
            assert "\n" not in str(error)
            told += 1
    assert told > len(places) * 0.9


@pytest.mark.parametrize("size", [1 << 60, 1 << 80])
@pytest.mark.parametrize(
    ("name", "kind"), [("a.txt", b"0"), ("a.json", b"0"), ("a.jpg", b"0"), ("a.txt", b"Z"), ("../a.txt", b"7")]
)
def test_a_member_larger_than_all_disks(name: str, kind: bytes, size: int, tmp_path: Path) -> None:
    refused(tmp_path / "a.tar", HONEST + member(name, kind=kind, size=size) + HONEST + END, "without the mark")


def test_a_negative_size(tmp_path: Path) -> None:
    for size in (-1, -512, -(1 << 40)):
        for kind in (b"0", b"x", b"L", b"Z"):
            refused(tmp_path / "a.tar", HONEST + member("a.txt", kind=kind, size=size) + END, f"member of {size} bytes")
        refused(tmp_path / "a.tar", HONEST + pax(size=str(-(1 << 20))) + HONEST + END, "cannot be read")


@pytest.mark.parametrize("header", [pax(path="a.txt"), member("l", b"a.txt\0", tarfile.GNUTYPE_LONGNAME)])
def test_headers_of_headers(header: bytes, tmp_path: Path) -> None:
    refused(tmp_path / "a.tar", header * 3000 + HONEST + END, "headers of headers")


def test_sparse_members_are_refused_or_left_out(tmp_path: Path) -> None:
    """The list of the pieces of such a file has no bound, and tarfile reads it whole before it returns the member."""
    refused(tmp_path / "a.tar", HONEST + member("a.txt", kind=tarfile.GNUTYPE_SPARSE) + END, "sparse")
    new = pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__name="a.txt", GNU__sparse__realsize="5")
    refused(tmp_path / "a.tar", HONEST + new + member("a.txt", b"1000000\n" + b"1\n" * 4000) + END, "sparse")
    old = pax(GNU__sparse__map="0,5", GNU__sparse__size="5", GNU__sparse__name="a.txt")
    (tmp_path / "a.tar").write_bytes(HONEST + old + member("a.txt", b"words") + END)
    assert read(tmp_path / "a.tar") == (DOCUMENTS, {"not a plain file": 1})


def test_global_headers_are_not_remembered(tmp_path: Path) -> None:
    noise = [pax(tarfile.XGLTYPE, **{f"key{number}": "x" * 20_000}) for number in range(200)]
    (tmp_path / "a.tar").write_bytes(b"".join(header + HONEST for header in noise) + END)
    documents = parse_source(f"x=webdataset:{tmp_path}/a.tar").documents()
    next(documents)
    tracemalloc.start()
    assert sum(1 for _ in documents) == 800 - 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # all of them are 4 MB


def test_reasons_do_not_grow_without_bound(tmp_path: Path) -> None:
    names = ["README", *(f"{number}.{number}" for number in range(500)), "last.jpg", "README"]
    (tmp_path / "a.tar").write_bytes(b"".join(map(member, names)) + END)
    documents, skipped = read(tmp_path / "a.tar")
    assert not documents and sum(skipped.values()) == len(names) and len(skipped) == MAX_REASONS + 1
    assert skipped["members without a suffix"] == 2 and skipped[OTHER_REASONS] == len(names) - MAX_REASONS - 1


def test_a_sign_across_two_pieces_of_a_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "aé日😀" * 20
    for size in (3, 4, 5, 7):
        monkeypatch.setattr(tar_files, "MAX_DOCUMENT_CHARACTERS", size)
        (tmp_path / "a.tar").write_bytes(member("a.txt", text.encode()) + END)
        assert "".join(read(tmp_path / "a.tar")[0]) == text
        (tmp_path / "a.tar").write_bytes(member("a.txt", text.encode()[:-1]) + END)
        assert "".join(read(tmp_path / "a.tar")[0]) == text[:-1] + "\ufffd"


def test_a_byte_order_mark_costs_no_record(tmp_path: Path) -> None:
    record = b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "a").write_bytes(record)
    (tmp_path / "b.gz").write_bytes(gzip.compress(record))
    assert read(tmp_path / "*", "jsonl") == (["one", "two"] * 2, {})


def test_a_long_document_of_any_kind_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One word of 64 million letters in a record would take the tokenizer ten gigabytes."""
    monkeypatch.setattr(module, "MAX_DOCUMENT_CHARACTERS", 10)
    texts = ["x" * 25, "", "y" * 10, "z" * 11]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        pieces = ["x" * 10, "x" * 10, "x" * 5, "", "y" * 10, "z" * 10, "z"]
        assert read(tmp_path / f"a.{kind}", kind) == (pieces, {})


def test_a_long_string_that_a_parquet_file_repeats_is_in_memory_once(tmp_path: Path) -> None:
    """A file of 50 KB that holds gigabytes, read as batches of dense strings."""
    rows = pyarrow.array([0] * 3000, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(rows, pyarrow.array(["word " * 200_000]))
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    before, most = pyarrow.total_allocated_bytes(), 0
    for number, text in enumerate(parse_source(f"x=parquet:{tmp_path}/a.parquet").documents()):
        assert len(text) == 1_000_000
        most = max(most, pyarrow.total_allocated_bytes() - before)
        if number == 600:
            break
    assert most < 50_000_000


def table() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [*DOCUMENTS * 10, None], "n": range(41)}), out, row_group_size=20)
    return out.getvalue()


FUZZED: dict[str, Callable[[], bytes]] = {
    "webdataset": lambda: pax(path="long.txt") + HONEST + pax(tarfile.XGLTYPE, comment="x") + HONEST + END,
    "jsonl": lambda: "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode(),
    "parquet": table,
    "text": lambda: "\n\n".join(DOCUMENTS).encode(),
}


@pytest.mark.parametrize("kind", FUZZED)
@pytest.mark.parametrize("packed", [False, True])
def test_any_damage_is_text_or_one_line(kind: str, packed: bool, tmp_path: Path) -> None:
    draw = random.Random(kind)
    whole = gzip.compress(FUZZED[kind]()) if packed else FUZZED[kind]()
    file = tmp_path / ("a.gz" if packed else "a")
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 5])):
            at = draw.randrange(len(content))
            length = draw.choice([0, 1, 1, 2, 8])
            content[at : at + length] = draw.choice([draw.randbytes(length), b"\xff" * length, b"9" * length, b""])
        file.write_bytes(content)
        try:
            documents, _ = read(file, kind)
            assert all(isinstance(text, str) for text in documents)
        except DataError as error:
            assert str(file) in str(error) and "\n" not in str(error)

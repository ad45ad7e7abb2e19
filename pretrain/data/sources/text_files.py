"""Plain text files, also gzipped: a document per block between blank lines, or per file."""

import glob
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from pretrain.errors import DataError

# A longer document is read as several, which bounds memory when a file has no blank line or no line break at all: the
# tokenizer takes 150 bytes a character where there are no spaces.
MAX_DOCUMENT_CHARACTERS = 1 << 22
Skip = Callable[[str], None]


def blocks(pattern: str, skip: Skip) -> Iterator[str]:
    """Documents separated by blank lines, file by file."""
    for file in files(pattern):
        yield from _pieces(file, _blocks)


def whole_files(pattern: str, skip: Skip) -> Iterator[str]:
    """One document a file."""
    for file in files(pattern):
        yield from _pieces(file, _whole)


def files(pattern: str) -> list[Path]:
    """The files that a glob pattern matches, sorted; raises `DataError` where there is none."""
    # Path.glob refuses absolute patterns, and users give those.
    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207
    there = sorted(Path(name) for name in found if Path(name).is_file())
    # Links lead to some files by several names: each is read once, under the first.
    first = {(status.st_dev, status.st_ino): path for path in reversed(there) if (status := path.stat())}
    matched = sorted(first.values())
    if not matched:
        raise DataError(f"source pattern `{pattern}` must match at least one file, it matches none")
    return matched


def size(pattern: str) -> int:
    """About how many bytes the files hold once they are decompressed."""
    total = 0
    for file in files(pattern):
        bytes_there = file.stat().st_size
        if file.suffix == ".gz" and bytes_there > 4:
            with file.open("rb") as raw:
                raw.seek(-4, 2)
                # A gzip file ends with its uncompressed size modulo 2**32.
                bytes_there = max(bytes_there, int.from_bytes(raw.read(4), "little"))
        total += bytes_there
    return total


def open_text(file: Path) -> TextIO:
    """`file` as text. Bytes that are no UTF-8 become U+FFFD: one of them must not stop a day of work."""
    # "-sig": a byte order mark is no part of the first record.
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", errors="replace")
    return file.open(encoding="utf-8-sig", errors="replace")


def unreadable(file: Path, error: Exception) -> DataError:
    """The error for a damaged file."""
    return DataError(f"`{file}` cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}")


DAMAGE = (OSError, EOFError, zlib.error)  # gzip reports damage as any of them


def _pieces(file: Path, read: Callable[[TextIO], Iterator[str]]) -> Iterator[str]:
    try:
        with open_text(file) as text:
            yield from read(text)
    except DAMAGE as error:
        raise unreadable(file, error) from None


def _blocks(text: TextIO) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    while line := text.readline(MAX_DOCUMENT_CHARACTERS):
        if line.isspace() or length + len(line) > MAX_DOCUMENT_CHARACTERS:
            if lines:
                yield "".join(lines)
            lines, length = [], 0
        if not line.isspace():
            lines.append(line)
            length += len(line)
    if lines:
        yield "".join(lines)


def _whole(text: TextIO) -> Iterator[str]:
    while piece := text.read(MAX_DOCUMENT_CHARACTERS):
        yield piece

"""Where documents come from: `[NAME=]KIND[:ARGUMENT]` names a reader in `KINDS`.

A new kind is one function (argument -> documents), one that estimates its size, and one registry line.
"""

import difflib
import glob
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pretrain.data.stdlib_docs import stdlib_docstrings, stdlib_topics
from pretrain.errors import DataError

# A longer document is read as several; it bounds memory when a file has no blank line or no line break at all.
MAX_DOCUMENT_CHARACTERS = 1 << 24
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class SourceKind:
    """A reader. read: documents in a fixed order; size: about how many bytes of text, for the ETA.

    licence: of the documents, empty where only the user can know.
    """

    read: Callable[[str], Iterator[str]]
    size: Callable[[str], int]
    licence: str = ""
    needs_argument: bool = True


@dataclass(frozen=True)
class Source:
    """One `--source`: the name its shards and its blend weight carry, and where its documents are."""

    name: str
    kind: str
    argument: str

    def documents(self) -> Iterator[str]:
        """Documents as they stand in the source, not yet cleaned; raises `DataError` naming a bad file."""
        return KINDS[self.kind].read(self.argument)

    def text_bytes(self) -> int:
        """About how many bytes `documents` will yield."""
        return KINDS[self.kind].size(self.argument)

    @property
    def licence(self) -> str:
        """Licence of the documents, empty where only the user can know."""
        return KINDS[self.kind].licence


def parse_source(spec: str) -> Source:
    """Reads `stdlib-docs`, `NAME=text:GLOB` or `NAME=text-file:GLOB`; raises `DataError` quoting `spec`."""
    head, colon, argument = spec.partition(":")
    name, equals, kind = head.partition("=")
    kind = kind if equals else name
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, list(KINDS), n=1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else f"kinds: {', '.join(KINDS)}"
        raise DataError(f"source `{spec}`: unknown kind `{kind}`; {hint}")
    if KINDS[kind].needs_argument and not (equals and argument):
        raise DataError(f"source `{spec}` must look like NAME={kind}:GLOB")
    if not KINDS[kind].needs_argument and colon:
        raise DataError(f"source `{spec}`: `{kind}` takes no `:{argument}`")
    if not NAME.fullmatch(name):
        raise DataError(f"source `{spec}`: the name must be 1 to 64 letters, digits, `_` or `-`, got `{name}`")
    return Source(name, kind, argument)


def parse_sources(specs: Sequence[str]) -> list[Source]:
    """`parse_source` of every spec; raises `DataError` where there is none or a name comes twice."""
    sources = [parse_source(spec) for spec in specs]
    names = [source.name for source in sources]
    if not names:
        raise DataError("at least one source must be given, got none")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"source names must differ, `{twice[0]}` comes {names.count(twice[0])} times")
    return sources


def _stdlib_documents(_: str) -> Iterator[str]:
    for _, text in stdlib_docstrings():
        yield text
    for _, text in stdlib_topics():
        yield text


def _stdlib_size(_: str) -> int:
    return sum(len(text) for text in _stdlib_documents(""))


def _files(pattern: str) -> list[Path]:
    # Path.glob refuses absolute patterns, and users give those.
    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207
    files = sorted(Path(name) for name in found if Path(name).is_file())
    if not files:
        raise DataError(f"source pattern `{pattern}` must match at least one file, it matches none")
    return files


def _open(file: Path) -> TextIO:
    # Bytes that are no UTF-8 become U+FFFD: one bad byte in a corpus must not stop a day of work.
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8", errors="replace")
    return file.open(encoding="utf-8", errors="replace")


def _pieces(file: Path, read: Callable[[TextIO], Iterator[str]]) -> Iterator[str]:
    try:
        with _open(file) as text:
            yield from read(text)
    except (OSError, EOFError, zlib.error) as error:  # gzip reports damage as any of them
        raise DataError(f"`{file}` cannot be read: {error}") from None


def _blocks(text: TextIO) -> Iterator[str]:
    """Documents separated by blank lines."""
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
    """One document, in pieces only when it is enormous."""
    while piece := text.read(MAX_DOCUMENT_CHARACTERS):
        yield piece


def _text_blocks(pattern: str) -> Iterator[str]:
    for file in _files(pattern):
        yield from _pieces(file, _blocks)


def _text_files(pattern: str) -> Iterator[str]:
    for file in _files(pattern):
        yield from _pieces(file, _whole)


def _text_size(pattern: str) -> int:
    total = 0
    for file in _files(pattern):
        size = file.stat().st_size
        if file.suffix == ".gz" and size > 4:
            with file.open("rb") as raw:
                raw.seek(-4, 2)
                # A gzip file ends with its uncompressed size modulo 2**32.
                size = max(size, int.from_bytes(raw.read(4), "little"))
        total += size
    return total


KINDS: dict[str, SourceKind] = {
    "stdlib-docs": SourceKind(_stdlib_documents, _stdlib_size, "Python Software Foundation License", False),
    "text": SourceKind(_text_blocks, _text_size),
    "text-file": SourceKind(_text_files, _text_size),
}

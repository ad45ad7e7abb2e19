"""Third-party WebDataset tars: `.txt` members are documents, `.json` members hold one in a field. Nothing is extracted.

Every other member, and whatever is not a plain file with a plain name, is skipped and counted; no pickle is opened.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from pretrain.data.record_files import MAX_RECORD_CHARACTERS, json_document, split_field
from pretrain.data.text_files import DAMAGE, MAX_DOCUMENT_CHARACTERS, Skip, files, unreadable

MAX_HEADER_BYTES = 1 << 20
# tarfile holds what these types carry in memory before anyone could look at it.
EXTENDED_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                    tarfile.GNUTYPE_LONGLINK)  # fmt: skip


def webdataset(argument: str, skip: Skip) -> Iterator[str]:
    """Documents of the tars (also compressed ones) that `GLOB[#FIELD]` matches, in the order of their members."""
    pattern, field = split_field(argument)
    for file in files(pattern):
        try:
            # "r|*" reads forward only: what an object store mounted as a folder is good at.
            with tarfile.open(file, "r|*", tarinfo=_Member, errorlevel=2) as tar:
                for member in tar:
                    yield from _documents(tar, member, field, skip)
                    tar.members = []  # type: ignore[attr-defined]  # otherwise it remembers every member
        except (*DAMAGE, tarfile.TarError, ValueError) as error:
            raise unreadable(file, error) from None


class _Member(tarfile.TarInfo):
    """A member whose extended headers are of bounded size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type in EXTENDED_HEADERS and member.size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {member.size} bytes, at most {MAX_HEADER_BYTES} are read")
        return member


def _documents(tar: tarfile.TarFile, member: tarfile.TarInfo, field: str, skip: Skip) -> Iterator[str]:
    name = PurePosixPath(member.name)
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        skip("not a plain file")
    elif name.is_absolute() or ".." in name.parts:
        skip("a name that leads outside")
    elif name.suffix not in (".txt", ".json"):
        skip(f"`{_short(name.suffix)}` members")
    else:
        content = tar.extractfile(member)
        assert content is not None  # it is a regular file
        yield from _text(content, member.size) if name.suffix == ".txt" else _json(content, member.size, field, skip)


def _text(content: IO[bytes], size: int) -> Iterator[str]:
    # A reader that is asked for 16 MiB makes room for them, however small the member is.
    while piece := content.read(min(size, MAX_DOCUMENT_CHARACTERS)):
        yield piece.decode("utf-8", "replace")


def _json(content: IO[bytes], size: int, field: str, skip: Skip) -> Iterator[str]:
    if size > MAX_RECORD_CHARACTERS:
        skip(f"longer than {MAX_RECORD_CHARACTERS} characters")
    else:
        yield from json_document(content.read(size).decode("utf-8", "replace"), field, skip)


def _short(suffix: str) -> str:
    return suffix[:12] if suffix.isascii() and suffix.isprintable() else "?"


def tar_size(argument: str) -> int:
    """Bytes of the tars themselves; a compressed one holds more."""
    return sum(Path(file).stat().st_size for file in files(split_field(argument)[0]))

"""Third-party WebDataset tars: `.txt` members are documents, `.json` members hold one in a field. Nothing is extracted.

Every other member, and whatever is not a plain file with a plain name, is skipped and counted; no pickle is opened.
tarfile takes much damage for the end of an archive, and would hang or grow without bound on some headers; here those
are errors.
"""

import bz2
import codecs
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

from pretrain.data.sources.record_files import MAX_RECORD_CHARACTERS, json_document, split_field
from pretrain.data.sources.text_files import DAMAGE, MAX_DOCUMENT_CHARACTERS, Skip, files, unreadable

# Not tarfile's own decompression: it checks no checksum and stops after the first of several compressed streams.
COMPRESSED: dict[bytes, Callable[[Path], io.BufferedIOBase]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
CHECKED_AT_ONCE = 1 << 16
MAX_HEADER_BYTES = 1 << 20
# tarfile holds what these types carry in memory before anyone could look at it.
EXTENDED_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                    tarfile.GNUTYPE_LONGLINK)  # fmt: skip


def webdataset(argument: str, skip: Skip) -> Iterator[str]:
    """Documents of the tars (also compressed ones) that `GLOB[#FIELD]` matches, in the order of their members."""
    pattern, field = split_field(argument)
    for file in files(pattern):
        try:
            with _opened(file) as stream:
                # "r|" reads forward only: what an object store mounted as a folder is good at.
                with tarfile.open(fileobj=_UntilEndMark(stream), mode="r|", tarinfo=_Member, errorlevel=2) as tar:
                    for member in tar:
                        yield from _documents(tar, member, field, skip)
                        tar.members, tar.pax_headers = [], {}  # type: ignore[attr-defined]  # it would remember all
                while stream.read(CHECKED_AT_ONCE):  # the checksum of a compressed stream stands at its end
                    pass
        except RecursionError:
            raise unreadable(file, ValueError("headers of headers of headers")) from None
        except (*DAMAGE, lzma.LZMAError, tarfile.TarError, ValueError) as error:
            raise unreadable(file, error) from None


def _opened(file: Path) -> io.BufferedIOBase:
    with file.open("rb") as raw:
        begins = raw.read(8)
    for magic, opener in COMPRESSED.items():
        if begins.startswith(magic):
            return opener(file)
    return file.open("rb")


class _UntilEndMark(io.RawIOBase):
    """The bytes of a tar, of which there are always enough: an archive ends with a mark, not where its file does.

    tarfile would look on for ever behind the end for a member that claims to be larger than all disks.
    """

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream

    def read(self, count: int = -1) -> bytes:
        piece = self._stream.read(count)
        if not piece:
            raise EOFError("it ends without the mark that ends a tar")
        return piece


class _Member(tarfile.TarInfo):
    """A member with a sound header, whose extended headers are of bounded size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark
            raise
        except tarfile.HeaderError as error:
            # Behind the first member tarfile takes a damaged header for the end.
            raise tarfile.ReadError(str(error)) from None
        if member.size < 0:
            raise ValueError(f"a member of {member.size} bytes")
        if member.type in EXTENDED_HEADERS and member.size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {member.size} bytes, at most {MAX_HEADER_BYTES} are read")
        return member

    def _no_sparse(self, *_: object) -> NoReturn:
        """A map of holes may be as long as it likes, and is held in memory."""
        raise ValueError("a sparse member")

    _proc_sparse = _proc_gnusparse_10 = _no_sparse


def _documents(tar: tarfile.TarFile, member: tarfile.TarInfo, field: str, skip: Skip) -> Iterator[str]:
    name = PurePosixPath(member.name)
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        skip("not a plain file")
    elif name.is_absolute() or ".." in name.parts:
        skip("a name that leads outside")
    elif name.suffix not in (".txt", ".json"):
        skip(f"`{_short(name.suffix)}` members" if name.suffix else "members without a suffix")
    else:
        content = tar.extractfile(member)
        assert content is not None  # it is a regular file
        yield from _text(content, member.size) if name.suffix == ".txt" else _json(content, member.size, field, skip)


def _text(content: IO[bytes], size: int) -> Iterator[str]:
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode  # a sign may lie across two pieces
    while size > 0 and (piece := content.read(min(size, MAX_DOCUMENT_CHARACTERS))):
        size -= len(piece)
        yield decode(piece, not size)


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

"""Files that either exist whole or not at all, and the one array format that shards and index share."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import DISK_ERRNOS, DiskError, ParlanceError
from pretrain.plain import open_plain

NPY_HEADER_BYTES = 128


def write_atomic(path: Path, content: bytes, within: Path | None = None) -> None:
    """Writes `content` to a temporary file, fsyncs, renames; a kill leaves the old file or the new one.

    within: folder of the temporary file, on the same file system; None: that of `path`.
    """
    temporary = (within or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        # The new name itself survives a power cut only once the folder is on disk.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):  # a full disk is not made fuller by what could not be finished
            temporary.unlink(missing_ok=True)
        raise as_disk_error(error, path) from None


def as_disk_error(error: OSError, path: Path) -> ParlanceError | OSError:
    """The error to raise for a failed write: `DiskError` when the disk itself is the reason."""
    if error.errno in DISK_ERRNOS:
        return DiskError(f"cannot write `{path}`: {os.strerror(error.errno)}; free space and run the command again")
    return error


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes at `offset`, fewer only where the file ends: a mounted object store may answer in pieces."""
    pieces: list[bytes] = []
    while count and (piece := os.pread(descriptor, count, offset)):
        pieces.append(piece)
        count, offset = count - len(piece), offset + len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a plain file's bytes, read in pieces; raises OSError for anything else."""
    with open_plain(path, follow=True) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The first 128 bytes of a .npy file, whatever numpy's version would choose."""
    sizes = "".join(f"{size}, " for size in shape).rstrip() if len(shape) == 1 else str(shape)[1:-1]
    header = f"{{'descr': '{dtype.newbyteorder('<').str}', 'fortran_order': False, 'shape': ({sizes}), }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(NPY_HEADER_BYTES - 11).encode() + b"\n"


def npy_bytes(array: np.ndarray) -> bytes:
    """`array` as a .npy file."""
    body = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return npy_header(array.shape, array.dtype) + body

"""What `verify` and `doctor` found, one line each."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.errors import CheckpointError, ConfigError, ParlanceError


@dataclass(frozen=True)
class Finding:
    """level: `ok`, `note` (worth knowing, nothing is wrong) or `BAD`. error: whose exit code a bad one calls for."""

    level: Literal["ok", "note", "BAD"]
    text: str
    error: type[ParlanceError] | None = None


@dataclass(frozen=True)
class Check:
    """A line of `doctor` and `launch-check`. text: what was found and, unless it is `ok`, what to do.

    error: whose exit code a FAIL calls for.
    """

    level: Literal["ok", "warn", "FAIL"]
    name: str
    text: str
    error: type[ParlanceError] = ConfigError


def fail(name: str, text: str) -> Check:
    """Nothing can start before this is mended."""
    return Check("FAIL", name, text)


def good(text: str) -> Finding:
    """Something was checked and is right."""
    return Finding("ok", text)


def note(text: str) -> Finding:
    """Nothing is wrong, but people should know."""
    return Finding("note", text)


def bad(text: str, error: type[ParlanceError] = CheckpointError) -> Finding:
    """`text` names the file, says what it must be and what it is."""
    return Finding("BAD", text, error)


def folder_bytes(folder: Path) -> int:
    """Bytes of the plain files below `folder`; what another process deletes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                found = (Path(parent) / name).lstat()
            except FileNotFoundError:
                continue
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def shown_bytes(count: int) -> str:
    """`116 MB`, in powers of ten as disks are sold."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count // size} {unit}"
    return f"{count} bytes"

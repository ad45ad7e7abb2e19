"""The manifest of a commit: size and sha256 of every file, and of itself, so that no flipped bit goes unseen."""

import hashlib
import json
import re
from pathlib import Path
from typing import IO, Any

from pretrain.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 10_000_000
_CHUNK = 1 << 20

Described = dict[str, Any]  # {"bytes": int, "sha256": hex}


def verify(path: Path) -> list[str]:
    """Every problem of a commit directory, one line each; empty when each bit is as it was committed."""
    try:
        with (path / MANIFEST).open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES)
        manifest = json.loads(text)
        files: dict[str, Described] = manifest["files"]
        if text != manifest_bytes(manifest["step"], files):
            return [f"{MANIFEST} is damaged"]
        if (step := number(path.name)) is not None and step != manifest["step"]:
            return [f"{MANIFEST} is of step {manifest['step']}"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read: {type(error).__name__}"]
    present = sorted(one.name for one in path.iterdir())
    problems = [f"{name} is not in the manifest" for name in present if name not in files and name != MANIFEST]
    for name, expected in files.items():
        try:
            with (path / name).open("rb") as file:
                found = describe(file)
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
            continue
        if found != expected:
            which = "bytes" if found["bytes"] != expected["bytes"] else "sha256"
            problems.append(f"{name}: {which} must be {expected[which]}, is {found[which]}")
    return problems


def manifest_bytes(step: int, files: dict[str, Described]) -> bytes:
    """The one and only text of a manifest: reading it and writing it again gives the same bytes."""
    body = json.dumps({"files": files, "format": FORMAT, "step": step}, sort_keys=True)
    content = {"files": files, "format": FORMAT, "sha256": hashlib.sha256(body.encode()).hexdigest(), "step": step}
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()


def describe(file: IO[bytes]) -> Described:
    """Size and sha256 of an open file."""
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def plain_files(folder: Path) -> list[Path]:
    """What `folder` holds, without its manifest; raises CheckpointError for anything but plain files."""
    paths = sorted(folder.iterdir())
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"`{path}` must be a plain file to be committed")
    return [path for path in paths if path.name != MANIFEST]


def number(name: str) -> int | None:
    """The step in the name of a commit or staging directory; None for any other name."""
    match = re.fullmatch(r"(?:step|staging)-(\d{8,})", name)
    return int(match[1]) if match else None

"""The manifest of a commit or bundle: size and sha256 of every file, and of itself: no flipped bit goes unseen.

A manifest may come from anyone, so nothing it says is followed out of its folder: names are plain names, files are
plain files, and a file is read only if it has the size that was promised.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

from pretrain.errors import CheckpointError
from pretrain.plain import open_plain

MANIFEST = "manifest.json"
FORMAT = 1
MAX_JSON_BYTES = 10_000_000
_CHUNK = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

Described = dict[str, Any]  # {"bytes": int, "sha256": hex}


def verify(path: Path, step_in_name: bool = True, unsealed: Collection[str] = ()) -> list[str]:
    """Every problem of a sealed directory, one line each; empty when each bit is as it was sealed.

    step_in_name: a name like that of a commit must be of the step in the manifest. unsealed: names that may be there
    although the manifest lacks them.
    """
    try:
        with open_plain(path / MANIFEST) as file:
            text = file.read(MAX_JSON_BYTES)
        manifest = json.loads(text)
        files: dict[str, Described] = manifest["files"]
        if text != manifest_bytes(manifest["step"], files) or not all(_sound(*one) for one in files.items()):
            return [f"{MANIFEST} is damaged"]
        if step_in_name and (step := number(path.name)) is not None and step != manifest["step"]:
            return [f"{MANIFEST} is of step {manifest['step']!r:.80}"]
        present = sorted(one.name for one in path.iterdir())
    except FileNotFoundError:  # of a directory, too, that is deleted meanwhile
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read: {type(error).__name__}"]
    known = {*files, *unsealed, MANIFEST}
    problems = [f"{_shown(name)} is not in the manifest" for name in present if name not in known]
    return [*problems, *(problem for name in files if (problem := _problem(path / name, files[name])))]


def check_staged(folder: Path, files: Mapping[str, Described]) -> None:
    """Raises CheckpointError unless `folder` holds exactly `files`, which the ranks say they have written.

    Each file is opened by its name: on a network file system a listing may be older than what other hosts wrote.
    """
    for path in plain_files(folder):
        if path.name not in files:
            raise CheckpointError(f"`{path}` must not be there: no rank wrote it")
    for name, described in files.items():
        try:
            with open_plain(folder / name) as file:
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise CheckpointError(f"`{folder / name}` must be there: a rank wrote it, it is not visible here") from None
        if size != described["bytes"]:
            raise CheckpointError(
                f"`{folder / name}` must have the {described['bytes']} bytes that a rank wrote, it has {size}"
            )


def seal_folder(folder: Path, step: int) -> None:
    """Writes the manifest of `folder`, whose files are all written; raises CheckpointError for links and folders."""
    files = {}
    for path in plain_files(folder):
        with open_plain(path) as file:
            files[path.name] = describe(file)
    (folder / MANIFEST).write_bytes(manifest_bytes(step, files))


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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a commit; raises CheckpointError for anything else."""
    try:
        with open_plain(path) as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise CheckpointError(f"`{path}` must have at most {MAX_JSON_BYTES} bytes")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path}` cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"`{path}` must hold an object, got {type(values).__name__}")
    return values


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


def _shown(name: str) -> str:
    return ascii(name)[1:-1]  # a name may hold line breaks


def _sound(name: str, described: Any) -> bool:
    kinds = {"bytes": int, "sha256": str}
    return _NAME.fullmatch(name) is not None and {key: type(value) for key, value in described.items()} == kinds


def _problem(path: Path, expected: Described) -> str | None:
    try:
        with open_plain(path) as file:
            found: Described = {"bytes": os.fstat(file.fileno()).st_size}
            if found["bytes"] == expected["bytes"]:
                found = describe(file)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if found == expected:
        return None
    which = "bytes" if found["bytes"] != expected["bytes"] else "sha256"
    return f"{path.name}: {which} must be {expected[which]!r:.80}, is {found[which]}"

"""Texts of every way, written one sentence at a time and each by all ways in turn, and kept beside the page.

    texts.jsonl     {"way", "bundle", "mode", ...}           what a way is, before its first text
                    {"way", "source", "call", "text", ...}   a text; source: hash of what it was written from

What stands there is not written again, so a second call is quick and a killed one goes on. Lines that a kill cut short
count for nothing. Times of ways are comparable where the same calls of the program took them, side by side.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.decoding import Exits
from finetune.progress import LineProgress
from finetune.report.ways import Way
from pretrain.checkpoints.commit import disk_errors
from pretrain.errors import CheckpointError, Requeue
from pretrain.plain import read_plain
from pretrain.signals import Signals

CACHE = "texts.jsonl"
WARM_UP = 2  # sentences of each way before its first clock: libraries plan for shapes that are new to them


@dataclass(frozen=True)
class Text:
    """One text. seconds: encoder and decoder, alone in its batch. cut: the source was too long. call: that took it."""

    text: str
    seconds: float
    passes: int
    cut: bool
    call: int
    exits: Exits | None = None


def write_all(ways: Sequence[Way], sources: Sequence[str], folder: Path, restart: bool = False) -> list[list[Text]]:
    """[way][source] of all texts; those that are not in `folder` yet are written now.

    restart: write all of them again.

    Raises:
        Requeue: SIGTERM or SIGUSR1 came; what was written is kept.
        CheckpointError, DiskError: the file of texts cannot be read or written.
    """
    path = folder / CACHE
    hashed = {source: hashlib.sha256(source.encode()).hexdigest()[:16] for source in sources}
    known = {} if restart else read_texts(path)
    distinct = {way.key: way for way in ways}.values()  # runs may have the same bundle
    missing = {
        source: several
        for source in hashed
        if (several := [way for way in distinct if (way.key, hashed[source]) not in known])
    }
    if missing:
        total, all_of_them = sum(map(len, missing.values())), len(distinct) * len(hashed)
        print(f"{path}: {total:,} of {all_of_them:,} texts are to be written", file=sys.stderr, flush=True)
        call = 1 + max((text.call for text in known.values()), default=0)
        with Signals() as signals, _Log(path, restart) as log, LineProgress("report", total) as progress:
            for way in distinct:
                if any(way in several for several in missing.values()):
                    _begin(way, sources, log)
            for turn, (source, several) in enumerate(missing.items()):
                # Nobody always comes first, or behind the same neighbour.
                for way in several[turn % len(several) :] + several[: turn % len(several)]:
                    text = known[way.key, hashed[source]] = _written(way, source, call)
                    log.append({"way": way.key, "source": hashed[source], **asdict(text)})
                    progress.add(1)
                    if signals.received:
                        raise Requeue(f"stopped by a signal, texts are in `{path}`: run the same command to go on")
    return [[known[way.key, hashed[source]] for source in sources] for way in ways]


def read_texts(path: Path) -> dict[tuple[str, str], Text]:
    """{(way, source): text} of a file of texts; none where there is no file. Lines that are no text are left out."""
    try:
        lines = read_plain(path).decode(errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error.strerror}") from None
    found = {}
    for line in lines:
        try:
            values = json.loads(line)
            key = values["way"], values["source"]
            found[key] = _text(values)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def _text(values: dict[str, Any]) -> Text:
    """Raises KeyError, TypeError or ValueError where these are not what was written."""
    kinds = {"text": str, "seconds": float, "passes": int, "cut": bool, "call": int}
    told = {name: values[name] for name in kinds}
    if any(type(told[name]) is not kind for name, kind in kinds.items()) or not 0 < told["seconds"] < float("inf"):
        raise ValueError("no text")
    exits = values["exits"]
    if exits is not None:
        exits = Exits(tuple(map(int, exits["tokens"])), int(exits["flops"]), int(exits["ramp_flops"]))
    return Text(**told, exits=exits)


def _written(way: Way, source: str, call: int) -> Text:
    made = way.writer.write([source], way.runner, batch_tokens=1)
    (passes,) = made.passes
    return Text(made.texts[0], made.seconds, passes, bool(made.cut), call, made.exits)


def _begin(way: Way, sources: Sequence[str], log: "_Log") -> None:
    log.append({"way": way.key, **way.identity})
    for source in sources[:WARM_UP]:
        way.writer.write([source], way.runner, batch_tokens=1)


class _Log:
    """The file of texts, at a fresh line; `restart` empties it. Raises DiskError where it cannot be written."""

    def __init__(self, path: Path, restart: bool) -> None:
        self.path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self.file = os.fdopen(os.open(path, flags, 0o666), "rb+", buffering=0)
            size = self.file.seek(0, os.SEEK_END)
            if restart:
                self.file.truncate(0)
            elif size and os.pread(self.file.fileno(), 1, size - 1) != b"\n":
                self.file.write(b"\n")

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, values: Mapping[str, Any]) -> None:
        """A line, whole or, behind a kill or on a full disk, cut short."""
        line = (json.dumps(values) + "\n").encode()
        with disk_errors(self.path):
            while line:
                line = line[self.file.write(line) :]

"""Pairs from local files: a TSV with source and target in two columns, JSON lines, or two parallel text files."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Literal

from finetune.tasks.base import Pair, Published, SplitName, TaskOptions, one_line
from pretrain.errors import ConfigError, DataError

Files = str | list[str]
# What reading a text file can end in.
UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError)


class PairsOptions(TaskOptions):
    """Each split is a TSV file (`train: pairs.tsv`), a file of JSON objects with `source` and `target`
    (`train: pairs.jsonl`) or two parallel files (`train: [text.src, text.tgt]`).

    Files ending in .gz are read through gzip. `valid` and `test` may be left out.
    """

    name: Literal["pairs"] = "pairs"
    train: Files | None = None
    valid: Files | None = None
    test: Files | None = None


class Pairs:
    """Local pairs."""

    name = "pairs"
    metrics: tuple[str, ...] = ("bleu", "rouge1", "rouge2", "rougeL")
    published: Published | None = None

    def __init__(self, options: PairsOptions) -> None:
        self.options = options

    def pairs(self, split: SplitName) -> list[Pair]:
        files = getattr(self.options, split)
        if files is None:
            if split == "train":
                raise ConfigError("`task.train` must name a TSV file, a JSONL file or two parallel files, got none")
            return []
        return read_pairs(files, f"task.{split}")[: self.options.limit]


def read_pairs(files: Files, name: str) -> list[Pair]:
    """The pairs of a TSV file, of a JSONL file (by its suffix) or of two parallel files; errors call them `name`.

    Raises:
        ConfigError, DataError: not one or two files, broken ones, or no pair.
    """
    if not isinstance(files, str):
        if len(files) != 2:
            raise ConfigError(f"`{name}` must be one TSV or JSONL file or two parallel files, got {len(files)}")
        pairs = parallel(files[0], files[1])
    else:
        pairs = _from_jsonl(files) if files.removesuffix(".gz").endswith(".jsonl") else _from_tsv(files)
    if not pairs:
        raise DataError(f"`{name}` must hold at least one pair, `{files}` holds none")
    return pairs


def _from_tsv(file: str) -> list[Pair]:
    pairs = []
    for number, line in enumerate(read_lines(file), start=1):
        source, tab, target = line.partition("\t")
        if not tab or "\t" in target:
            tabs = line.count("\t")
            raise DataError(f"`{file}` line {number} must be source, a tab and target, got {tabs} tabs")
        pairs.append(Pair(one_line(source), one_line(target)))
    return pairs


def _from_jsonl(file: str) -> list[Pair]:
    pairs = []
    for number, line in enumerate(read_lines(file), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"`{file}` line {number} must be a JSON object: {error}") from None
        fields = record if isinstance(record, dict) else {}
        source, target = fields.get("source"), fields.get("target")
        if not isinstance(source, str) or not isinstance(target, str):
            raise DataError(f"`{file}` line {number} must have texts `source` and `target`, got {line[:80]}")
        pairs.append(Pair(one_line(source), one_line(target)))
    return pairs


def parallel(source: str | Path, target: str | Path) -> list[Pair]:
    """The pairs of two files with as many lines; raises DataError where they have not, or cannot be read."""
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        raise DataError(f"`{target}` must have as many lines as `{source}`, {len(sources)}, it has {len(targets)}")
    return [Pair(one_line(left), one_line(right)) for left, right in zip(sources, targets, strict=True)]


def read_lines(path: str | Path) -> list[str]:
    """Lines of a UTF-8 text file, .gz or plain, without their ends; only a line feed ends a line.

    Raises:
        DataError: naming the file, if it cannot be read or is no UTF-8.
    """
    file = Path(path)
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = raw.decode("utf-8")
    except UNREADABLE as error:
        raise unreadable(path, error) from None
    # str.splitlines would also break at form feeds and Unicode separators, and shift every later line.
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def unreadable(path: str | Path, error: Exception) -> DataError:
    """The error to raise where `path` cannot be read because of one of `UNREADABLE`."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return DataError(f"`{path}` must be a UTF-8 text file: {reason}")

"""Pairs from local files: a TSV with source and target in two columns, or two parallel text files."""

import gzip
from pathlib import Path
from typing import Literal

from finetune.tasks.base import Pair, SplitName, one_line
from pretrain.config import Section
from pretrain.errors import ConfigError, DataError

Files = str | list[str]


class PairsOptions(Section):
    """Each split is a TSV file (`train: pairs.tsv`) or two parallel files (`train: [text.src, text.tgt]`).

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

    def __init__(self, options: PairsOptions) -> None:
        self.options = options

    def pairs(self, split: SplitName) -> list[Pair]:
        files = getattr(self.options, split)
        if files is None:
            if split == "train":
                raise ConfigError("`task.train` must name a TSV file or two parallel files, got none")
            return []
        return read_pairs(files, f"task.{split}")


def read_pairs(files: Files, name: str) -> list[Pair]:
    """The pairs of a TSV file or of two parallel files; errors call them `name`.

    Raises:
        ConfigError, DataError: not one or two files, broken ones, or no pair.
    """
    pairs = _from_tsv(files) if isinstance(files, str) else _from_parallel(files, name)
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


def _from_parallel(files: list[str], name: str) -> list[Pair]:
    if len(files) != 2:
        raise ConfigError(f"`{name}` must be one TSV file or two parallel files, got {len(files)}")
    sources, targets = read_lines(files[0]), read_lines(files[1])
    if len(sources) != len(targets):
        raise DataError(f"`{files[1]}` must have as many lines as `{files[0]}`, {len(sources)}, it has {len(targets)}")
    return [Pair(one_line(source), one_line(target)) for source, target in zip(sources, targets, strict=True)]


def read_lines(path: str | Path) -> list[str]:
    """Lines of a UTF-8 text file, .gz or plain, without their ends; only a line feed ends a line.

    Raises:
        DataError: naming the file, if it cannot be read or is no UTF-8.
    """
    file = Path(path)
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"`{path}` must be a UTF-8 text file: {error}") from None
    # str.splitlines would also break at form feeds and Unicode separators, and shift every later line.
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines

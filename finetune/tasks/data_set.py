"""Tasks whose pairs were published as a set: read from a folder in one of its layouts, or from the Hugging Face hub.

A task file describes its set as a `DataSet`; `DataSetTask` makes a task of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.tasks.base import Pair, Published, SplitName, TaskOptions, one_line
from finetune.tasks.pairs import parallel
from pretrain.errors import ConfigError, DataError, ParlanceError

SEPARATOR = " [SEP] "  # between the parts of a source, as GLGE writes them; plain text for a tokenizer
DEV: Mapping[SplitName, str] = {"train": "train", "valid": "dev", "test": "test"}
HUB: Mapping[SplitName, str] = {"train": "train", "valid": "validation", "test": "test"}

# The pairs of a split in a folder; None where the folder has no such files.
Reader = Callable[[Path, SplitName], Iterable[Pair] | None]
# Pairs of a split as they were published -> as the field uses them.
Prepare = Callable[[Iterable[Pair], SplitName], Iterable[Pair]]


def as_published(pairs: Iterable[Pair], split: SplitName) -> Iterable[Pair]:
    """The pairs, unchanged."""
    return pairs


@dataclass(frozen=True)
class DataSet:
    """A published set.

    metrics, published: of the task. get: what a folder must hold and where to get it, for the error that says so.
    readers: of the layouts, tried in turn. columns: of the set on the hub; the last is the target, those before it make
    the source, and a dot leads into a column of columns. from_hub: what is done to its pairs.
    """

    name: str
    metrics: tuple[str, ...]
    get: str
    readers: tuple[Reader, ...]
    columns: tuple[str, ...]
    from_hub: Prepare = as_published
    published: Published | None = None


class DataSetOptions(TaskOptions):
    """path: a folder of the set. hub: in its place `ID[/CONFIG][@REVISION]` of the Hugging Face hub, streamed.

    columns: of the set on the hub where they are not the usual ones: those of the source, then that of the target.
    """

    name: str
    path: str | None = None
    hub: str | None = None
    columns: list[str] | None = None


class DataSetTask:
    """The pairs of a published set."""

    def __init__(self, about: DataSet, options: DataSetOptions) -> None:
        self.about, self.options = about, options
        self.name, self.metrics, self.published = about.name, about.metrics, about.published

    def pairs(self, split: SplitName) -> list[Pair]:
        path, hub = self.options.path, self.options.hub
        if (path is None) == (hub is None):
            given = "neither" if path is None else "both"
            raise ConfigError(
                f"task `{self.name}` must be given `task.path`, a folder, or `task.hub`, an id of the Hugging Face "
                f"hub, got {given}: {self.about.get}"
            )
        found = self._from_hub(hub, split) if hub is not None else self._from_folder(Path(path or ""), split)
        pairs = [Pair(one_line(pair.source), one_line(pair.target)) for pair in islice(found, self.options.limit)]
        if not pairs:
            raise DataError(f"`{path or hub}` must hold at least one pair of split {split}, it holds none")
        return pairs

    def _from_folder(self, folder: Path, split: SplitName) -> Iterable[Pair]:
        if not folder.is_dir():
            raise DataError(f"`task.path` must be a folder, `{folder}` is none: {self.about.get}")
        for read in self.about.readers:
            found = read(folder, split)
            if found is not None:
                return found
        raise DataError(f"`{folder}` has no files of split {split} of task `{self.name}`: {self.about.get}")

    def _from_hub(self, hub: str, split: SplitName) -> Iterable[Pair]:
        columns = tuple(self.options.columns or self.about.columns)
        if len(columns) < 2:
            raise ConfigError(f"`task.columns` must name at least a source and a target, got {', '.join(columns)}")
        return self.about.from_hub(self._hub_pairs(hub, columns, split), split)

    def _hub_pairs(self, hub: str, columns: tuple[str, ...], split: SplitName) -> Iterator[Pair]:
        from pretrain.data.sources.hub import open_split, parse

        asked = parse(hub)
        try:
            for row in open_split(asked, HUB[split]):
                *source, target = (_cell(row, column, hub) for column in columns)
                yield Pair(SEPARATOR.join(source), target)
        except ParlanceError:
            raise
        except Exception as error:  # fsspec, aiohttp, pyarrow and datasets each raise their own
            reason = " ".join(str(error).split())[:160]
            raise DataError(
                f"`task.hub` {hub} cannot be read from the Hugging Face hub ({type(error).__name__}: {reason}); "
                f"with `task.path` in its place: {self.about.get}"
            ) from None


def aligned(
    pattern: str,
    splits: Mapping[SplitName, str] = DEV,
    sides: tuple[str, str] = ("src", "tgt"),
    prepare: Prepare = as_published,
) -> Reader:
    """A layout of two parallel files a split, plain or gzipped: `pattern` with {split} and {side} names them."""

    def read(folder: Path, split: SplitName) -> Iterable[Pair] | None:
        names = [pattern.format(split=splits[split], side=side) for side in sides]
        files = [plain_or_gzipped(folder / name) for name in names]
        if not any(files):
            return None
        for name, file in zip(names, files, strict=True):
            if file is None:
                raise DataError(f"`{folder / name}` must be beside the other side of its pairs, it is missing")
        return prepare(parallel(str(files[0]), str(files[1])), split)

    return read


def plain_or_gzipped(file: Path) -> Path | None:
    """`file` or `file`.gz, whichever is there."""
    return next((path for path in (file, file.with_name(f"{file.name}.gz")) if path.is_file()), None)


def _cell(row: Any, column: str, hub: str) -> str:
    value = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, str):
        raise DataError(f"`task.hub` {hub} must have a text in column `{column}`, it has columns {', '.join(row)}")
    return value

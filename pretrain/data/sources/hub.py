"""Datasets of the Hugging Face hub, streamed at a pinned commit: `ID[/CONFIG][@REVISION][#FIELD]`.

Only data is read: `datasets` 4 and later run no script of a repository, and nothing here would let them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.data.sources.text_files import Skip
from pretrain.errors import DataError

SECONDS = 15.0
COMMIT = re.compile(r"[0-9a-f]{40}")
SPEC = re.compile(
    r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?(?:#(?P<field>.+))?"
)


@dataclass(frozen=True)
class HubDataset:
    """A parsed `ID[/CONFIG][@REVISION][#FIELD]`."""

    id: str
    config: str | None
    revision: str | None
    field: str


def parse(argument: str) -> HubDataset:
    """Reads the argument of `hf:`; raises `DataError` quoting it."""
    found = SPEC.fullmatch(argument)
    if found is None or ".." in argument:
        raise DataError(f"source `hf:{argument}` must look like hf:OWNER/NAME[/CONFIG][@REVISION][#FIELD]")
    return HubDataset(found["id"], found["config"], found["revision"], found["field"] or "text")


def pin(argument: str) -> str:
    """The argument with its revision as a commit, so that the same text is read after a kill; asks the hub.

    Raises:
        DataError: the hub cannot be reached or has no such dataset.
    """
    asked = parse(argument)
    if asked.revision and COMMIT.fullmatch(asked.revision):
        return argument
    try:
        commit = _info(asked).sha
    except Exception as error:  # network, missing repository, offline mode: each has a type of its own
        raise _no_hub(argument, error) from None
    config = f"/{asked.config}" if asked.config else ""
    return f"{asked.id}{config}@{commit}#{asked.field}"


def stream(argument: str, skip: Skip) -> Iterator[str]:
    """Documents of the `train` split in the order of the hub's files; `argument` as `pin` returns it."""
    asked = parse(argument)
    try:
        rows = open_split(asked, "train")
        if rows.column_names is not None and asked.field not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise DataError(f"source `hf:{argument}` must have a column `{asked.field}`, it has {columns}")
        for row in rows:
            if isinstance(row.get(asked.field), str):
                yield row[asked.field]
            else:
                skip(f"no text in `{asked.field}`")
    except DataError:
        raise
    except Exception as error:  # fsspec, aiohttp, pyarrow and datasets each raise their own
        raise _no_hub(argument, error) from None


def open_split(asked: HubDataset, split: str) -> Any:
    """The rows of a split as `datasets` streams them; raises whatever the hub and `datasets` raise."""
    import datasets

    _info(asked)  # `datasets` would ask a hub that is not there for half a minute
    return datasets.load_dataset(asked.id, asked.config, split=split, streaming=True, revision=asked.revision)


def default_name(argument: str) -> str:
    """The name of a source that was given none: that of the dataset and its configuration."""
    asked = parse(argument)
    return re.sub(
        r"[^A-Za-z0-9_-]", "-", "-".join([asked.id.split("/")[-1], *([asked.config] if asked.config else [])])
    )


def _info(asked: HubDataset) -> Any:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(asked.id, revision=asked.revision, timeout=SECONDS)


def _no_hub(argument: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:160]
    return DataError(
        f"source `hf:{argument}` cannot be read from the Hugging Face hub ({type(error).__name__}: {reason}): download "
        "its files and give NAME=parquet:GLOB, NAME=jsonl:GLOB or NAME=text:GLOB instead"
    )

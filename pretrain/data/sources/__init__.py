"""Where documents come from: `[NAME=]KIND[:ARGUMENT]` names a reader in `KINDS`.

A new kind is one function (argument, skip -> documents), one that estimates its size, and one registry line.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.sources import hub, record_files, tar_files, text_files
from pretrain.data.sources.stdlib_docs import stdlib_docstrings, stdlib_topics
from pretrain.data.sources.text_files import MAX_DOCUMENT_CHARACTERS, Skip
from pretrain.errors import ConfigError, DataError
from pretrain.parsing import read_yaml

# Foreign tars can have a member with a suffix of its own for every document.
MAX_REASONS, OTHER_REASONS = 32, "for other reasons"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class SourceKind:
    """A reader. read: documents in a fixed order, telling `skip` the reason for each that is left out.

    size: about how many bytes of text, for the ETA; 0 where nobody knows. argument: what follows the colon, for
    messages, empty where nothing may. licence: of the documents, empty where only the user can know. name: the name of
    a source that is given none, from its argument. pin: settles what the argument leaves open.
    """

    read: Callable[[str, Skip], Iterator[str]]
    size: Callable[[str], int]
    argument: str = "GLOB"
    licence: str = ""
    name: Callable[[str], str] | None = None
    pin: Callable[[str], str] = lambda argument: argument


@dataclass(frozen=True)
class Source:
    """One `--source`: the name its shards and its blend weight carry, and where its documents are."""

    name: str
    kind: str
    argument: str

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[str]:
        """Documents as they stand in the source, not yet cleaned, none longer than `MAX_DOCUMENT_CHARACTERS`.

        Raises `DataError` naming a bad file.

        skipped: counts what is left out, by reason; the reasons beyond `MAX_REASONS` share one.
        """
        counted = Counter[str]() if skipped is None else skipped

        def skip(reason: str) -> None:
            counted[reason if reason in counted or len(counted) < MAX_REASONS else OTHER_REASONS] += 1

        for document in KINDS[self.kind].read(self.argument, skip):
            yield document[:MAX_DOCUMENT_CHARACTERS]
            for at in range(MAX_DOCUMENT_CHARACTERS, len(document), MAX_DOCUMENT_CHARACTERS):
                yield document[at : at + MAX_DOCUMENT_CHARACTERS]

    def text_bytes(self) -> int:
        """About how many bytes `documents` will yield."""
        return KINDS[self.kind].size(self.argument)

    def pinned(self) -> "Source":
        """This source with everything settled that could change between two readings."""
        return Source(self.name, self.kind, KINDS[self.kind].pin(self.argument))

    @property
    def spec(self) -> str:
        """The `--source` that gives this source."""
        named = self.kind if self.name == self.kind else f"{self.name}={self.kind}"
        return f"{named}:{self.argument}" if self.argument else named

    @property
    def licence(self) -> str:
        """Licence of the documents, empty where only the user can know."""
        return KINDS[self.kind].licence


def parse_source(spec: str) -> Source:
    """Reads `[NAME=]KIND[:ARGUMENT]`; raises `DataError` quoting `spec`."""
    head, colon, argument = spec.partition(":")
    name, equals, kind_name = head.partition("=")
    kind_name = kind_name if equals else name
    if kind_name not in KINDS:
        near = difflib.get_close_matches(kind_name, list(KINDS), n=1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else f"kinds: {', '.join(KINDS)}"
        raise DataError(f"source `{spec}`: unknown kind `{kind_name}`; {hint}")
    kind = KINDS[kind_name]
    if kind.argument and not (argument and (equals or kind.name)):
        wanted = "" if kind.name else "NAME="
        raise DataError(f"source `{spec}` must look like {wanted}{kind_name}:{kind.argument}")
    if not kind.argument and colon:
        raise DataError(f"source `{spec}`: `{kind_name}` takes no `:{argument}`")
    if kind.name and not equals:
        name = kind.name(argument)
    if not NAME.fullmatch(name):
        raise DataError(f"source `{spec}`: the name must be 1 to 64 letters, digits, `_` or `-`, got `{name}`")
    return Source(name, kind_name, argument)


def parse_sources(specs: Sequence[str]) -> list[Source]:
    """`parse_source` of every spec; raises `DataError` where there is none or a name comes twice."""
    sources = [parse_source(spec) for spec in specs]
    names = [source.name for source in sources]
    if not names:
        raise DataError("at least one source must be given, got none")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"source names must differ, `{twice[0]}` comes {names.count(twice[0])} times")
    return sources


def read_specs(path: str | Path) -> list[str]:
    """The specs in a YAML file of `NAME: KIND[:ARGUMENT]` lines.

    Raises:
        ConfigError: the file cannot be read or says something else.
    """
    values = read_yaml(path)
    for name, rest in values.items():
        if not isinstance(name, str) or not isinstance(rest, str):
            raise ConfigError(f"`{path}` must have lines `NAME: KIND:WHERE`, got {name!r:.60}: {rest!r:.60}")
    return [f"{name}={rest}" for name, rest in values.items()]


def _stdlib_documents(_: str, skip: Skip) -> Iterator[str]:
    for _, text in stdlib_docstrings():
        yield text
    for _, text in stdlib_topics():
        yield text


def _stdlib_size(_: str) -> int:
    return sum(len(text) for text in _stdlib_documents("", lambda reason: None))


def _record_size(argument: str) -> int:
    return text_files.size(record_files.split_field(argument)[0])


KINDS: dict[str, SourceKind] = {
    "stdlib-docs": SourceKind(_stdlib_documents, _stdlib_size, "", "Python Software Foundation License"),
    "text": SourceKind(text_files.blocks, text_files.size),
    "text-file": SourceKind(text_files.whole_files, text_files.size),
    "jsonl": SourceKind(record_files.json_lines, _record_size, "GLOB[#FIELD]"),
    "parquet": SourceKind(record_files.parquet, _record_size, "GLOB[#FIELD]"),
    "webdataset": SourceKind(tar_files.webdataset, tar_files.tar_size, "GLOB[#FIELD]"),
    "hf": SourceKind(
        hub.stream, lambda argument: 0, "ID[/CONFIG][@REVISION][#FIELD]", name=hub.default_name, pin=hub.pin
    ),
}

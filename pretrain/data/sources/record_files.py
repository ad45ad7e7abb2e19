"""Files of records, one field of which is the document: JSON lines (also gzipped) and Parquet.

A record without a usable text is skipped and counted under a name; a damaged file is an error that names it.
"""

import json
from collections.abc import Iterator
from typing import Any, TextIO

from pretrain.data.sources.text_files import DAMAGE, Skip, files, open_text, unreadable
from pretrain.errors import DataError

# Python takes some 25 bytes for a character of JSON that is all brackets.
MAX_RECORD_CHARACTERS = 1 << 24
BATCH_ROWS = 256


def json_lines(argument: str, skip: Skip) -> Iterator[str]:
    """Documents of `GLOB[#FIELD]`, a JSON object a line; FIELD is `text` unless given."""
    pattern, field = split_field(argument)
    for file in files(pattern):
        try:
            with open_text(file) as text:
                for line in _lines(text, skip):
                    yield from json_document(line, field, skip)
        except DAMAGE as error:
            raise unreadable(file, error) from None


def parquet(argument: str, skip: Skip) -> Iterator[str]:
    """Documents of `GLOB[#FIELD]`, read a batch of rows at a time; FIELD names a column of strings."""
    import pyarrow
    from pyarrow import parquet as reader

    pattern, field = split_field(argument)
    for file in files(pattern):
        try:
            with reader.ParquetFile(file) as opened:
                schema = opened.schema_arrow
            kind = schema.field(field).type if field in schema.names else None
            if kind is None or not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                columns = ", ".join(f"{one.name} ({one.type})" for one in schema)[:200]
                raise DataError(f"`{file}` must have a column `{field}` of strings, it has {columns}")
            # A file may say one long string a million times; as a dictionary it is in memory once.
            with reader.ParquetFile(file, read_dictionary=[field]) as opened:
                for batch in opened.iter_batches(BATCH_ROWS, columns=[field]):
                    for value in batch.column(0):
                        text = value.as_py()
                        if text is None:
                            skip(f"no `{field}`")
                        else:
                            yield text
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise unreadable(file, error) from None


def json_document(text: str, field: str, skip: Skip) -> Iterator[str]:
    """The document in one JSON object, if it has one."""
    try:
        record: Any = json.loads(text)
    except (ValueError, RecursionError):
        skip("not JSON")
        return
    document = record.get(field) if isinstance(record, dict) else None
    if isinstance(document, str):
        yield document
    else:
        skip(f"no text in `{field}`")


def split_field(argument: str) -> tuple[str, str]:
    """`GLOB#FIELD` as (GLOB, FIELD)."""
    pattern, _, field = argument.partition("#")
    return pattern, field or "text"


def _lines(text: TextIO, skip: Skip) -> Iterator[str]:
    """Lines that are not blank; one too long to be a record is skipped without being held in memory."""
    while line := text.readline(MAX_RECORD_CHARACTERS):
        if len(line) == MAX_RECORD_CHARACTERS and not line.endswith("\n"):
            skip(f"longer than {MAX_RECORD_CHARACTERS} characters")
            while (rest := text.readline(MAX_RECORD_CHARACTERS)) and not rest.endswith("\n"):
                pass
        elif not line.isspace():
            yield line

"""PersonaChat (Zhang et al. 2018): the next turn of a dialogue from the speaker's profile and what was said before.

GLGE's folder has `profile [SEP] history` as source, lower-cased. Beside it, the CSV files of Synthetic-Persona-Chat
(Jandaghi et al. 2023) are read, which have a dialogue a record: each turn but the first is a target, its source the
profile of who says it, `[SEP]`, and all turns before it; lower-cased as in GLGE.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from finetune.tasks.base import Pair, Published, SplitName
from finetune.tasks.data_set import SEPARATOR, DataSet, plain_or_gzipped
from finetune.tasks.glge import PAPER, READERS, get
from finetune.tasks.pairs import read_lines
from pretrain.errors import DataError

TURN = re.compile(r"User ([12]): ?(.*)")
PROFILES = {"1": "user 1 personas", "2": "user 2 personas"}
DIALOGUE = "Best Generated Conversation"


def synthetic(folder: Path, split: SplitName) -> Iterable[Pair] | None:
    """The pairs of `Synthetic-Persona-Chat_{train,valid,test}.csv`."""
    file = plain_or_gzipped(folder / f"Synthetic-Persona-Chat_{split}.csv")
    return None if file is None else _dialogues(file)


def _dialogues(file: Path) -> Iterator[Pair]:
    text = "\n".join(read_lines(file))
    try:
        for record in csv.DictReader(io.StringIO(text, newline=""), strict=True):
            texts = [record.get(column) for column in (*PROFILES.values(), DIALOGUE)]
            if not all(isinstance(one, str) for one in texts):
                raise DataError(f"`{file}` must have columns {', '.join(PROFILES.values())} and {DIALOGUE}")
            yield from _turns({user: record[column] for user, column in PROFILES.items()}, record[DIALOGUE])
    except csv.Error as error:
        raise DataError(f"`{file}` must be a CSV file: {error}") from None


def _turns(profiles: dict[str, str], dialogue: str) -> Iterator[Pair]:
    turns: list[tuple[str, str]] = []
    for line in dialogue.split("\n"):
        found = TURN.fullmatch(line.strip())
        if found:
            turns.append((found[1], found[2]))
        elif turns:  # a turn of several lines
            turns[-1] = (turns[-1][0], f"{turns[-1][1]} {line}")
    for index, (user, text) in enumerate(turns[1:], start=1):
        history = " ".join(said for _, said in turns[:index])
        yield Pair(f"{profiles[user]}{SEPARATOR}{history}".lower().replace("[sep]", "[SEP]"), text.lower())


PERSONACHAT = DataSet(
    name="personachat",
    metrics=(
        "personachat_bleu1",
        "personachat_bleu2",
        "distinct1",
        "distinct2",
        "overall_personachat",
        "personachat_corpus_bleu",
        "repetition",
        "length_ratio",
    ),
    get=f"{get('personachat')}; or the CSV files of https://github.com/google-research-datasets/Synthetic-Persona-Chat",
    readers=(*READERS, synthetic),
    columns=("source", "target"),
    published=Published(PAPER, {"train": 122_499, "valid": 14_602, "test": 14_056}, 11.9),
)

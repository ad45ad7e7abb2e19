"""IWSLT14 German -> English, prepared as fairseq's `prepare-iwslt14.sh` does.

Lower-cased; pairs of 1 to 175 tokens and a ratio up to 1.5; every 23rd of them is for validation; the test set is
dev2010, dev2012 and tst2010 to tst2012, one after the other. A folder holds either the files of the archive or what
that script made of them, which is Moses-tokenised.
"""

import html
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from finetune.tasks.base import Pair, Published, SplitName, one_line
from finetune.tasks.data_set import DataSet, aligned, plain_or_gzipped
from finetune.tasks.pairs import read_lines
from finetune.tasks.translation import FAIRSEQ, METRICS, cleaning, joined
from pretrain.errors import DataError

SIDES = ("de", "en")
EVERY = 23
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
ABOUT_TALK = re.compile(r"</?(url|talkid|keywords|speaker|reviewer|translator|doc)\b")
TAG = re.compile(r"</?(title|description)>")
SEGMENT = re.compile(r"<seg id=\"[0-9]+\">\s*(.*?)\s*</seg>")
clean = cleaning(most=175, lower=True)


def archive(folder: Path, split: SplitName) -> Iterable[Pair] | None:
    """The pairs of the files of `de-en.tgz`."""
    if plain_or_gzipped(folder / "train.tags.de-en.de") is None:
        return None
    if split == "test":
        return clean((pair for name in TEST_SETS for pair in _aligned(folder, f"IWSLT14.{name}.de-en.{{}}.xml")), split)
    # A pair is left out before they are counted, and validation has passed the filter as well.
    kept = enumerate(clean(_aligned(folder, "train.tags.de-en.{}"), "train"), start=1)
    return (pair for number, pair in kept if (number % EVERY == 0) == (split == "valid"))


def _aligned(folder: Path, pattern: str) -> Iterator[Pair]:
    sides = [_texts(folder / pattern.format(side)) for side in SIDES]
    if len(sides[0]) != len(sides[1]):
        raise DataError(
            f"`{folder / pattern.format('en')}` must have as many texts as `{pattern.format('de')}`, {len(sides[0])}, "
            f"it has {len(sides[1])}"
        )
    return (Pair(source, target) for source, target in zip(*sides, strict=True))


def _texts(path: Path) -> list[str]:
    """The texts of a file, one a segment, or one a line that is not about the talk."""
    lines = read_lines(plain_or_gzipped(path) or path)
    if path.suffix == ".xml":
        found = [segment[1] for line in lines if (segment := SEGMENT.search(line))]
        texts = [html.unescape(text).replace("\u2019", "'") for text in found]  # as the script does, here alone
    else:
        texts = [TAG.sub("", line) for line in lines if not ABOUT_TALK.search(line)]
    return [one_line(text) for text in texts]


IWSLT14_DE_EN = DataSet(
    name="iwslt14-de-en",
    metrics=METRICS,
    get="it must hold train.tags.de-en.de and the rest of the archive "
    "https://wit3.fbk.eu/archive/2014-01/texts/de/en/de-en.tgz, or train.de, train.en, valid.de and so on as fairseq's "
    "examples/translation/prepare-iwslt14.sh writes them; or task.hub=bbaaaa/iwslt14-de-en-preprocess",
    readers=(archive, aligned("{split}.{side}", FAIRSEQ, SIDES, joined)),
    columns=("translation.de", "translation.en"),
    published=Published("fairseq's script", {"train": 160_239, "valid": 7_283, "test": 6_750}),
)

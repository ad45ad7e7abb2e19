"""What the tasks of translation share: their metrics, and the preparation that fairseq's scripts made usual.

Those scripts leave Moses-tokenised text in subword units. Files of theirs are read as they are, the units put together
again: what the tokenizer of the bundle makes of the words replaces their BPE. Raw text (of the hub, of an archive)
stays raw, so that no Moses is needed; only pairs are chosen as by `clean-corpus-n`, their tokens counted by sacreBLEU's
13a.
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial

from finetune.tasks.base import Pair, SplitName
from finetune.tasks.data_set import Prepare

# The papers' figures are bleu_tok and bleu_compound, which mean something for tokenised files alone.
METRICS = ("bleu", "bleu_lc", "bleu_tok", "bleu_compound", "repetition", "length_ratio")
FAIRSEQ: dict[SplitName, str] = {"train": "train", "valid": "valid", "test": "test"}  # what it calls the splits
UNITS = re.compile(r"@@( |$)")


def joined(pairs: Iterable[Pair], split: SplitName) -> Iterator[Pair]:
    """The pairs with subword units (`sub@@ word`) put together."""
    for pair in pairs:
        yield Pair(UNITS.sub("", pair.source), UNITS.sub("", pair.target))


def cleaning(most: int, lower: bool = False, ratio: float = 1.5) -> Prepare:
    """Pairs of raw text as the field trains on: each side of 1 to `most` tokens, neither `ratio` times the other.

    Validation and test sets keep every pair. lower: lower-case both sides, in every split.
    """
    return partial(_clean, most=most, lower=lower, ratio=ratio)


def _clean(pairs: Iterable[Pair], split: SplitName, most: int, lower: bool, ratio: float) -> Iterator[Pair]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    for pair in pairs:
        if split == "train":
            short, long = sorted(len(tokenize(side).split()) for side in (pair.source, pair.target))
            if not 1 <= short <= long <= min(most, ratio * short):
                continue
        yield Pair(pair.source.lower(), pair.target.lower()) if lower else pair

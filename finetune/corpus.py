"""Pairs as token ids, in the form that `pretrain.data.stream.SampleStream` feeds training from."""

from collections.abc import Sequence

import numpy as np

from finetune.tasks import Pair
from pretrain.data.tokenizer import TextTokenizer
from pretrain.errors import DataError
from pretrain.models import SpecialIds
from pretrain.objectives import Example, Objective


class PairCorpus:
    """Encoded pairs of one split, one source of data.

    Sources are cut to `max_source` tokens; pairs whose target exceeds `max_target` are left out, because a cut target
    would teach the model to stop early. Both limits count BOS and EOS. Pairs with an empty side are left out, too: they
    teach to write nothing, or something from nothing. cut, left_out, empty: how many pairs that befell.

    Args:
        name: what an error calls the pairs.

    Raises:
        DataError: no pair is left.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: TextTokenizer,
        ids: SpecialIds,
        max_source: int,
        max_target: int,
        name: str = "pairs",
    ) -> None:
        self.ids = ids
        sources = tokenizer.encode_batch([pair.source for pair in pairs])
        targets = tokenizer.encode_batch([pair.target for pair in pairs])
        full = [index for index in range(len(pairs)) if len(sources[index]) and len(targets[index])]
        kept = [index for index in full if len(targets[index]) + 2 <= max_target]
        self.empty, self.left_out = len(pairs) - len(full), len(full) - len(kept)
        if not kept:
            raise DataError(
                f"at least one of the {name} must have a source and a target of at most {max_target} tokens, none of "
                f"{len(pairs)} has: {self.empty} have an empty side, {self.left_out} a longer target"
            )
        self.cut = sum(len(sources[index]) + 2 > max_source for index in kept)
        self._sources = _Ragged([sources[index][: max_source - 2] for index in kept])
        self._targets = _Ragged([targets[index] for index in kept])
        self.sizes = [len(kept)]
        self.longest = max(self.length(0, index) for index in range(len(kept)))

    def befell(self, max_source: int, max_target: int) -> str:
        """What happened to the pairs, for people."""
        return (
            f"{self.cut} sources cut to {max_source} tokens, {self.left_out} targets longer than {max_target} and "
            f"{self.empty} empty pairs left out"
        )

    def length(self, source: int, index: int) -> int:
        """Tokens of the longer side of a pair with BOS and EOS: what it asks of a micro-batch."""
        return max(self._sources.length(index), self._targets.length(index)) + 2

    def example(self, source: int, index: int, rng: np.random.Generator, objective: Objective) -> Example:
        """The pair after `objective.corrupt_pair`."""
        return objective.corrupt_pair(
            enclose(self._sources.row(index), self.ids), enclose(self._targets.row(index), self.ids), rng
        )


class _Ragged:
    """Rows of different lengths in two arrays, which workers share without touching a Python object a row."""

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self.ends = np.cumsum([0, *(len(row) for row in rows)])
        self.flat = np.concatenate([np.empty(0, np.int32), *rows])

    def length(self, index: int) -> int:
        return int(self.ends[index + 1] - self.ends[index])

    def row(self, index: int) -> np.ndarray:
        return self.flat[self.ends[index] : self.ends[index + 1]]


def enclose(tokens: np.ndarray, ids: SpecialIds) -> np.ndarray:
    """int64 [N + 2]: the tokens between BOS and EOS."""
    return np.concatenate([[ids.bos], tokens, [ids.eos]]).astype(np.int64)

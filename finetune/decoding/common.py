"""What every decoder returns, and the pieces they share.

Shapes: L rows, D width, V vocabulary, X tokens that are never written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.models import EncoderDecoder

USUAL_LENGTH = 64  # of a text in tokens, with BOS and EOS, where neither option nor bundle tells


@dataclass(frozen=True)
class Generated:
    """The texts of a batch of sources.

    tokens: int64 [N] per text, without BOS and EOS. scores: what the decoder ranks hypotheses by (see there).
    passes: how often the decoder ran over this batch. exits: where tokens left the decoder, if they did so early.
    drafts: how much of what was drafted was right, if anything was. n_best: texts of each source, one behind the other.
    """

    tokens: list[np.ndarray]
    scores: list[float]
    passes: int
    exits: "Exits | None" = None
    drafts: "Drafts | None" = None
    n_best: int = 1


@dataclass(frozen=True)
class Exits:
    """Where written tokens left the decoder, EOS counted, and what that took.

    tokens: their number for each layer. flops: of the decoder with its off-ramps, of which `ramp_flops` are those.
    """

    tokens: tuple[int, ...]
    flops: int
    ramp_flops: int

    def __add__(self, other: "Exits") -> "Exits":
        tokens = tuple(a + b for a, b in zip(self.tokens, other.tokens, strict=True))
        return Exits(tokens, self.flops + other.flops, self.ramp_flops + other.ramp_flops)

    @property
    def mean(self) -> float:
        """Mean exit layer, counted from 1."""
        return sum(number * count for number, count in enumerate(self.tokens, start=1)) / max(1, sum(self.tokens))

    @property
    def shares(self) -> list[float]:
        """Share of the tokens that left after each layer."""
        return [count / max(1, sum(self.tokens)) for count in self.tokens]

    def report(self) -> str:
        """The same for people."""
        shares = " ".join(f"{number}: {100 * share:.0f} %" for number, share in enumerate(self.shares, start=1))
        return f"mean exit layer {self.mean:.2f} ({shares})"


@dataclass(frozen=True)
class Drafts:
    """How far drafted blocks agreed with greedy search, and what that saved.

    accepted: number of blocks of which 0, 1, .. N tokens were accepted. tokens: written, EOS counted. passes: over each
    text, added up; greedy search takes one a token. compared: seconds of drafting, seconds of greedy search, and texts
    that differ, where both were run.
    """

    accepted: tuple[int, ...]
    tokens: int
    passes: int
    compared: tuple[float, float, int] | None = None

    def __add__(self, other: "Drafts") -> "Drafts":
        accepted = tuple(a + b for a, b in zip(self.accepted, other.accepted, strict=True))
        compared = None
        if self.compared and other.compared:
            (a, b, c), (d, e, f) = self.compared, other.compared
            compared = a + d, b + e, c + f
        return Drafts(accepted, self.tokens + other.tokens, self.passes + other.passes, compared)

    @property
    def mean(self) -> float:
        """Mean accepted length of a block."""
        return sum(number * count for number, count in enumerate(self.accepted)) / max(1, sum(self.accepted))

    def report(self) -> str:
        """The same for people."""
        blocks = max(1, sum(self.accepted))
        shares = " ".join(f"{number}: {100 * count / blocks:.0f} %" for number, count in enumerate(self.accepted))
        told = (
            f"{self.tokens / max(1, self.passes):.2f} tokens a pass where greedy search writes 1, "
            f"accepted {self.mean:.2f} of {len(self.accepted) - 1} drafted ({shares})"
        )
        if self.compared is None:
            return told
        drafting, greedy, differ = self.compared
        return (
            f"{told}, {greedy / drafting:.2f} times as fast as greedy search ({drafting:.2f} s, {greedy:.2f} s), "
            f"{differ} texts differ"
        )


TakenT = TypeVar("TakenT", Exits, Drafts)


def added(one: TakenT | None, other: TakenT | None) -> TakenT | None:
    """Both together, or the one that is there."""
    return one + other if one and other else one or other


def check_length(model: EncoderDecoder, max_length: int) -> None:
    """Raises ConfigError if a text of `max_length` tokens has no positions in the model."""
    limit = model.config.max_positions
    if max_length > limit:
        raise ConfigError(f"`max_length` must be at most the model's {limit} positions, got {max_length}")


def until_eos(tokens: Sequence[Tensor], scores: Sequence[Tensor], eos: int, passes: int) -> Generated:
    """Texts up to their first EOS. tokens, scores: per text, each row's token and log-probability, on the host.

    Score of a text: the mean over its tokens and the EOS; a text without EOS has all its rows.
    """
    texts, means = [], []
    for token_N, score_N in zip(tokens, scores, strict=True):
        ends = (token_N == eos).nonzero()
        length = int(ends[0]) if len(ends) else len(token_N)
        texts.append(token_N[:length].numpy())
        means.append(float(score_N[: length + 1].mean()))
    return Generated(texts, means, passes)


def most_likely(model: EncoderDecoder, h_LD: Tensor, banned: list[int] | Tensor) -> tuple[Tensor, Tensor]:
    """(token_L int64, log-probability_L float32 or wider) of the best token that is not banned.

    Probabilities are over the whole vocabulary, so banning changes the choice and no number. Only two values a row
    outlive the logits, which exist in blocks alone.

    Args:
        banned: ids; int64 as a tensor, which a CUDA graph needs on the device.
    """
    banned_X = torch.as_tensor(banned, device=h_LD.device)

    def best(logits_LV: Tensor) -> tuple[Tensor, Tensor]:
        logits_LV = logits_LV.float() if logits_LV.dtype.itemsize < 4 else logits_LV
        total_L = logits_LV.logsumexp(dim=1)
        logits_LV.index_fill_(1, banned_X, -torch.inf)
        found = logits_LV.max(dim=1)
        return found.indices, found.values - total_L

    token_L, log_p_L = model.head(h_LD, reduction=best)
    return token_L, log_p_L

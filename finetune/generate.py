"""Texts for many sources, in batches of similar length, in the order of the sources; what a bundle can write in."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch

from finetune.corpus import enclose
from finetune.decoding import Drafts, Exits, Generated
from finetune.decoding.common import added
from finetune.runners import Runner
from finetune.runners.exits import trained_with
from finetune.tasks import one_line
from pretrain.bundles.description import Description
from pretrain.data.tokenizer import TextTokenizer
from pretrain.errors import UsageError
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.rows import to_device

# What modes a bundle must have for each --mode, of several alternatives one; plain BART writes left to right on its
# content stream.
NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "ar": (("ar",), ("causal",)),
    "nar": (("nar",),),
    "hard_exit": (("hard_exit",),),
    "soft_exit": (("soft_exit",),),
    "draft": (("ar", "nar"),),
}
HINTS = {
    "draft": ": NAR drafts what AR verifies; `python -m finetune train` with `runner.name=janus` trains both",
}


@dataclass(frozen=True)
class Written:
    """The texts of some sources and what they cost.

    texts: one line each, `n_best` of each source one behind the other. scores: what the decoder ranks each by, see
    there. sentences: number of sources. passes: how many batches took so many decoder passes. seconds: encoding and
    decoding, without tokenisation. cut: sources shortened to `max_source` tokens. repeats: tokens that `dedup` removed.
    exits: where tokens left the decoder, if they did so early. drafts: how much of what was drafted was
    right, if anything was.
    """

    texts: list[str]
    passes: Counter[int]
    seconds: float
    max_source: int
    cut: int = 0
    repeats: int = 0
    exits: Exits | None = None
    drafts: Drafts | None = None
    sentences: int = 0
    scores: list[float] = field(default_factory=list)
    n_best: int = 1

    def __add__(self, other: "Written") -> "Written":
        """What both cost together; their texts are not kept, so that the sum over a big file stays small."""
        return Written(
            [],
            self.passes + other.passes,
            self.seconds + other.seconds,
            self.max_source,
            self.cut + other.cut,
            self.repeats + other.repeats,
            added(self.exits, other.exits),
            added(self.drafts, other.drafts),
            self.sentences + other.sentences,
            n_best=self.n_best,
        )

    def report(self) -> str:
        """One line for people: passes, speed and whatever was done to the texts."""
        lines = self.sentences
        passes = " to ".join(str(count) for count in sorted({min(self.passes), max(self.passes)}))
        notes = f", {self.cut} sources cut to {self.max_source} tokens" if self.cut else ""
        notes += f", dedup removed {self.repeats} tokens" if self.repeats else ""
        notes += f", {self.exits.report()}" if self.exits else ""
        notes += f", {self.drafts.report()}" if self.drafts else ""
        return (
            f"{lines} sentences in {self.passes.total()} batch(es), {passes} decoder passes a batch, "
            f"{lines / self.seconds:.1f} sentences/s, {1000 * self.seconds / lines:.2f} ms a sentence{notes}"
        )


def write_texts(
    model: EncoderDecoder,
    tokenizer: TextTokenizer,
    runner: Runner,
    sources: Sequence[str],
    max_source: int,
    batch_tokens: int = 4096,
    dedup: bool = False,
    first: int = 0,
    told: Callable[[int], None] | None = None,
) -> Written:
    """Generates for every source, longest first, in batches of at most `batch_tokens` source tokens.

    The texts do not depend on how sources are batched. max_source: tokens with BOS and EOS that a longer source is cut
    to, because positions beyond were never trained. dedup: leave out a token equal to the one before it. first: number
    of the first source in its file, for decoders that draw. told: called after each batch with its number of sources.
    """
    ids, device = model.ids, model.shared.weight.device
    encoded = tokenizer.encode_batch([one_line(source) for source in sources])
    rows = [enclose(tokens[: max_source - 2], ids) for tokens in encoded]
    found: list[list[tuple[str, float]]] = [[] for _ in rows]
    passes, seconds, repeats, n_best = Counter[int](), 0.0, 0, 1
    exits: Exits | None = None
    drafts: Drafts | None = None
    for batch in batches([len(row) for row in rows], batch_tokens):
        source = to_device(
            SourceRows.pack([rows[index] for index in batch], [first + index for index in batch]), device
        )
        started = time.perf_counter()
        made: Generated = runner.generate(model, source)  # results are on the host, so the device is done
        seconds += time.perf_counter() - started
        passes[made.passes] += 1
        exits, drafts = added(exits, made.exits), added(drafts, made.drafts)
        n_best = made.n_best
        owners = [index for index in batch for _ in range(n_best)]
        for index, tokens, score in zip(owners, made.tokens, made.scores, strict=True):
            kept = without_repeats(tokens) if dedup else tokens
            repeats += len(tokens) - len(kept)
            found[index].append((one_line(tokenizer.decode(kept)), score))
        if told:
            told(len(batch))
    cut = sum(len(tokens) > max_source - 2 for tokens in encoded)
    flat = [one for several in found for one in several]
    texts, scores = [text for text, _ in flat], [score for _, score in flat]
    return Written(texts, passes, seconds, max_source, cut, repeats, exits, drafts, len(rows), scores, n_best)


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, longest first, in groups whose number times longest length stays within `batch_tokens`."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // lengths[order[start]])
        yield order[start : start + count]
        start += count


def without_repeats(tokens: np.ndarray) -> np.ndarray:
    """`tokens` without those equal to the one before them."""
    return np.array([token for token, _ in groupby(tokens.tolist())], dtype=tokens.dtype)


def check_mode(description: Description, bundle_path: str, mode: str, options: Mapping[str, Any]) -> None:
    """Raises UsageError if the bundle cannot write in `mode` with these options of its decoder."""
    if not any(set(one) <= set(description.modes) for one in NEEDS[mode]):
        wanted = " or ".join(" and ".join(one) for one in NEEDS[mode])
        several = "s" if any(len(one) > 1 for one in NEEDS[mode]) else ""
        raise UsageError(
            f"`--mode` {mode} needs a bundle with mode{several} {wanted}, `{bundle_path}` has "
            f"{', '.join(description.modes)}{HINTS.get(mode, '')}"
        )
    if mode == "nar" and not description.length_trained:
        raise UsageError(
            f"`--mode` nar needs a trained length predictor, that of `{bundle_path}` never was: tune the bundle first, "
            "`python -m finetune train` with `runner.name=nar`"
        )
    if mode not in ("hard_exit", "soft_exit") or trained_with(description).get("rows") != "target":
        return
    if mode == "soft_exit" or not description.length_trained:
        raise UsageError(
            f"`--mode` {mode} needs a bundle trained with a fixed number of rows, `{bundle_path}` took the length of "
            "each text from it (`rows` target): tune the bundle first, `python -m finetune train` with "
            f"`runner.name={mode}`"
        )
    if options.get("rows", "fixed") != "predicted":
        raise UsageError(
            f"`--rows` must be predicted where `{bundle_path}` took the length of each text from the number of rows "
            "(`rows` target), got fixed"
        )


def device_named(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here; raises UsageError where there is none."""
    on_cuda = torch.cuda.is_available()
    if name == "cuda" and not on_cuda:
        raise UsageError("`--device` cuda needs a CUDA device, found none")
    return torch.device("cuda" if on_cuda and name != "cpu" else "cpu")

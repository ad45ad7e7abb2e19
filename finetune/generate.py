"""`generate`: texts for the lines of a file, in batches of similar length, in the order of the input."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune import runners
from finetune.corpus import enclose
from finetune.decoding import Drafts, Exits, Generated
from finetune.runners import Runner
from finetune.runners.exits import trained_with
from finetune.tasks import one_line
from finetune.tasks.pairs import read_lines
from pretrain.bundles.bundle import load_bundle
from pretrain.bundles.description import Description
from pretrain.data.files import write_atomic
from pretrain.data.tokenizer import TextTokenizer
from pretrain.errors import DataError, UsageError
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.rows import to_device

# Of which modes a bundle must have one for each --mode; plain BART writes left to right on its content stream.
NEEDS = {
    "ar": ("ar", "causal"),
    "nar": ("nar",),
    "hard_exit": ("hard_exit",),
    "soft_exit": ("soft_exit",),
    "draft": ("ar",),
}
STANDARD = "-"


@dataclass(frozen=True)
class Written:
    """The texts of some sources and what they cost.

    texts: one line each. passes: decoder passes of each batch. seconds: encoding and decoding, without tokenisation.
    cut: sources shortened to `max_source` tokens. repeats: tokens that `dedup` removed. exits: where tokens left the
    decoder, if they did so early. drafts: how much of what was drafted was right, if anything was.
    """

    texts: list[str]
    passes: list[int]
    seconds: float
    max_source: int
    cut: int = 0
    repeats: int = 0
    exits: Exits | None = None
    drafts: Drafts | None = None

    def report(self) -> str:
        """One line for people: passes, speed and whatever was done to the texts."""
        lines = len(self.texts)
        passes = f"{min(self.passes)} to {max(self.passes)}" if len(set(self.passes)) > 1 else f"{self.passes[0]}"
        notes = f", {self.cut} sources cut to {self.max_source} tokens" if self.cut else ""
        notes += f", dedup removed {self.repeats} tokens" if self.repeats else ""
        notes += f", {self.exits.report()}" if self.exits else ""
        notes += f", {self.drafts.report()}" if self.drafts else ""
        return (
            f"{lines} sentences in {len(self.passes)} batch(es), {passes} decoder passes a batch, "
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
) -> Written:
    """Generates for every source, longest first, in batches of at most `batch_tokens` source tokens.

    The texts do not depend on how sources are batched. max_source: tokens with BOS and EOS that a longer source is cut
    to, because positions beyond were never trained. dedup: leave out a token equal to the one before it.
    """
    ids, device = model.ids, model.shared.weight.device
    encoded = tokenizer.encode_batch([one_line(source) for source in sources])
    rows = [enclose(tokens[: max_source - 2], ids) for tokens in encoded]
    texts, passes, seconds, repeats = [""] * len(rows), [], 0.0, 0
    exits: Exits | None = None
    drafts: Drafts | None = None
    for batch in batches([len(row) for row in rows], batch_tokens):
        source = to_device(SourceRows.pack([rows[index] for index in batch]), device)
        started = time.perf_counter()
        made: Generated = runner.generate(model, source)  # results are on the host, so the device is done
        seconds += time.perf_counter() - started
        passes.append(made.passes)
        if made.exits:
            exits = made.exits if exits is None else exits + made.exits
        if made.drafts:
            drafts = made.drafts if drafts is None else drafts + made.drafts
        for index, tokens in zip(batch, made.tokens, strict=True):
            kept = without_repeats(tokens) if dedup else tokens
            repeats += len(tokens) - len(kept)
            texts[index] = one_line(tokenizer.decode(kept))
    cut = sum(len(tokens) > max_source - 2 for tokens in encoded)
    return Written(texts, passes, seconds, max_source, cut, repeats, exits, drafts)


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


def generate(
    bundle_path: str,
    mode: str,
    source_file: str,
    target_file: str,
    options: Mapping[str, Any],
    batch_tokens: int = 4096,
    dedup: bool = False,
    device: str = "auto",
) -> Written:
    """Reads lines, writes as many, and prints passes and speed on stderr. `-` is stdin or stdout.

    options: of the mode's decoder.

    Raises:
        UsageError: the bundle cannot write in `mode`.
        CheckpointError, ConfigError, DataError: a bad bundle, option or input.
    """
    if STANDARD not in (source_file, target_file) and Path(target_file).resolve() == Path(source_file).resolve():
        raise UsageError(f"`--output` must be another file than `--input`, both are `{target_file}`")
    bundle = load_bundle(bundle_path)
    description = bundle.description
    check_mode(description, bundle_path, mode, options)
    sources = _stdin_lines() if source_file == STANDARD else read_lines(source_file)
    if not sources:
        raise DataError(f"`{source_file}` must hold at least one line, it is empty")
    runner = runners.build({"name": mode, "decoding": dict(options)}, description)
    model = bundle.model.to(device_named(device))
    written = write_texts(model, bundle.tokenizer, runner, sources, description.longest_source, batch_tokens, dedup)
    text = "".join(f"{line}\n" for line in written.texts)
    if target_file == STANDARD:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        Path(target_file).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(target_file), text.encode())
    print(f"{mode}: {written.report()}", file=sys.stderr, flush=True)
    return written


def check_mode(description: Description, bundle_path: str, mode: str, options: Mapping[str, Any]) -> None:
    """Raises UsageError if the bundle cannot write in `mode` with these options of its decoder."""
    modes = description.modes
    if mode == "draft" and not {"ar", "nar"} <= set(modes):
        raise UsageError(
            f"`--mode` draft needs a bundle with modes ar and nar, `{bundle_path}` has {', '.join(modes)}: NAR drafts "
            "what AR verifies; `python -m finetune train` with `runner.name=draft` trains both"
        )
    if not set(NEEDS[mode]) & set(modes):
        wanted = " or ".join(NEEDS[mode])
        raise UsageError(f"`--mode` {mode} needs a bundle with mode {wanted}, `{bundle_path}` has {', '.join(modes)}")
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


def _stdin_lines() -> list[str]:
    text = sys.stdin.read()
    return text.removesuffix("\n").split("\n") if text else []

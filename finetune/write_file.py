"""`generate`: a text for each line of a file, in windows of lines, so that memory is bounded and a kill costs little.

Windows follow from the input and the options alone. A run that was killed and goes on therefore makes the same batches
as one that was not, and the same bytes.
"""

import gzip
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from finetune import runners
from finetune.generate import Written
from finetune.partial import BUNDLE, INPUT, Partial
from finetune.progress import LineProgress
from finetune.runners import Runner
from finetune.runners.by_graphs import MOST_ROWS, NO_GRAPHS, ByGraphs
from finetune.tasks.pairs import UNREADABLE, unreadable
from finetune.writer import BATCH_TOKENS, Writer
from pretrain.bundles.bundle import check_outside, content_sha256
from pretrain.errors import DataError, Requeue, UsageError
from pretrain.signals import Signals

STANDARD = "-"
FEWEST_LINES = 64  # of a window
EMPTY = "`{}` must hold at least one line, it is empty"


def generate(
    bundle: str,
    mode: str,
    source_file: str,
    target_file: str,
    options: Mapping[str, Any],
    batch_tokens: int = BATCH_TOKENS,
    dedup: bool = False,
    device: str = "auto",
    scores: bool = False,
    restart: bool = False,
    eager: bool = False,
) -> Written:
    """Writes `n_best` lines for each line read, and prints passes and speed on stderr. `-` is stdin or stdout.

    From file to file, what stands in full windows is kept behind a kill or a signal, and the same call goes on there.

    Args:
        options: of the mode's decoder.
        scores: each line is the number of its source from 1, the score and the text, with tabs between.
        restart: begin anew where a part has been written.
        eager: do without CUDA graphs on a GPU.

    Returns:
        What this call's part of the lines took, without the texts.

    Raises:
        UsageError: the bundle cannot write in `mode`, or a part that was written with something else is there.
        CheckpointError, ConfigError, DataError: a bad bundle, option or input.
        Requeue: SIGTERM or SIGUSR1 came; the part is kept.
    """
    if STANDARD not in (source_file, target_file) and Path(target_file).resolve() == Path(source_file).resolve():
        raise UsageError(f"`--output` must be another file than `--input`, both are `{target_file}`")
    if target_file != STANDARD:
        check_outside(Path(target_file), "--output")
    writer = Writer(bundle, device, eager)
    nothing = Written([], Counter(), 0.0, writer.description.longest_source)
    runner = writer.runner(mode, options)
    if writer.graphs:
        told = f"in batches of up to {MOST_ROWS:,} padded tokens; `--eager` writes without"
        told = f"by CUDA graphs {told}" if isinstance(runner, ByGraphs) else f"eagerly: {NO_GRAPHS}"
        print(f"{mode}: {told}", file=sys.stderr, flush=True)
    windows = _Windows(writer, runner, batch_tokens, dedup, scores, nothing)
    if target_file == STANDARD:
        windows.to_stdout(source_file)
    else:
        of_decoder = runners.decoding(mode, options)
        rest = {"mode": mode, "batch_tokens": batch_tokens, "dedup": dedup, "scores": scores}
        where = f"{writer.device.type}, eager" if eager and writer.device.type == "cuda" else writer.device.type
        identity = {BUNDLE: content_sha256(bundle), "device": where, **of_decoder, **rest}
        windows.to_file(source_file, Path(target_file), identity, restart)
    told = windows.written.report() if windows.written.sentences else "every line was there, nothing was left to write"
    told += f", {windows.empty} sources empty" if windows.empty else ""
    print(f"{mode}: {told}", file=sys.stderr, flush=True)
    return windows.written


@dataclass
class _Windows:
    """Texts of lines, window by window. written: what that took so far. empty: lines among them without a word."""

    writer: Writer
    runner: Runner
    batch_tokens: int
    dedup: bool
    scores: bool
    written: Written
    empty: int = 0

    def to_stdout(self, source: str) -> None:
        with LineProgress("generate", None) as progress:
            for text, _ in self._texts(lines_of(source), 0, progress.add):
                sys.stdout.write(text)
                sys.stdout.flush()
        if not self.written.sentences:
            raise DataError(EMPTY.format(source))

    def to_file(self, source: str, target: Path, identity: Mapping[str, Any], restart: bool) -> None:
        """What comes from stdin cannot be read again, so that nothing of it is kept."""
        from_file = source != STANDARD
        content, total = survey(source) if from_file else (STANDARD, None)
        with ExitStack() as stack:
            part = stack.enter_context(Partial(target, {**identity, INPUT: content}, restart, keep=from_file))
            if part.lines:
                print(
                    f"{part.path}: {part.lines:,} of {total:,} lines are there, going on", file=sys.stderr, flush=True
                )
            signals = stack.enter_context(Signals()) if from_file else None
            progress = stack.enter_context(LineProgress("generate", total, part.lines))

            def told(lines: int) -> None:
                progress.add(lines)
                if signals and signals.received:
                    raise Requeue(
                        f"stopped by a signal, {part.lines} lines are in `{part.path}`: run the same command to go on"
                    )

            for text, lines in self._texts(islice(lines_of(source), part.lines, None), part.lines, told):
                part.append(text.encode(), lines)
            if total is not None and part.lines != total:
                raise DataError(f"`{source}` must not change while it is read: of {total} lines {part.lines} came")
            if not part.lines:
                raise DataError(EMPTY.format(source))
            part.finish()

    def _texts(self, lines: Iterator[str], first: int, told: Callable[[int], None]) -> Iterator[tuple[str, int]]:
        """(text, number of sources) of each window. first: number of the first source in its file."""
        while window := list(islice(lines, max(FEWEST_LINES, self.batch_tokens // 4))):
            made = self.writer.write(window, self.runner, self.batch_tokens, self.dedup, first, told)
            self.written += made
            self.empty += sum(not line.strip() for line in window)
            yield "".join(f"{line}\n" for line in self._lines(made, first)), len(window)
            first += len(window)

    def _lines(self, made: Written, first: int) -> Iterable[str]:
        if not self.scores:
            return made.texts
        scored = enumerate(zip(made.scores, made.texts, strict=True))
        return [f"{first + 1 + at // made.n_best}\t{score:.6f}\t{text}" for at, (score, text) in scored]


def survey(path: str) -> tuple[str, int]:
    """(sha256, number of lines) of a text file; raises DataError as `lines_of` does, and where it is empty."""
    digest = hashlib.sha256()
    count = sum(1 for _ in lines_of(path, digest.update))
    if not count:
        raise DataError(EMPTY.format(path))
    return digest.hexdigest(), count


def lines_of(source: str, see: Callable[[bytes], object] = len) -> Iterator[str]:
    """Lines of a UTF-8 text file, .gz or plain, or of stdin, one at a time; only a line feed ends a line.

    see: is given the bytes of each line.

    Raises:
        DataError: naming the file, if it cannot be read or is no UTF-8.
    """
    try:
        with ExitStack() as stack:
            if source == STANDARD:
                file: Iterable[bytes] = sys.stdin.buffer
            elif source.endswith(".gz"):
                file = stack.enter_context(gzip.open(source))
            else:
                file = stack.enter_context(Path(source).open("rb"))
            for line in file:
                see(line)
                yield line.decode().removesuffix("\n").removesuffix("\r")
    except UNREADABLE as error:
        raise unreadable(source, error) from None

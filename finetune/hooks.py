"""What tuning adds to the hooks of pre-training: whole texts in every way that is tuned for, and their scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from finetune.decoding import Exits
from finetune.generate import Written, write_texts
from finetune.runners import Runner
from finetune.scores import score
from finetune.tasks import Pair
from pretrain.data.tokenizer import TextTokenizer
from pretrain.engine import Engine
from pretrain.hooks import Note, stop_if_signalled
from pretrain.loop import StepReport
from pretrain.models import EncoderDecoder
from pretrain.runs import write_text
from pretrain.watch.tensorboard import TensorBoard, plain


def written_tag(mode: str, *name: str) -> str:
    """The name in TensorBoard of what was measured of texts written in `mode`, or of their table."""
    return "/".join(("written", mode, *name))


class WrittenTexts:
    """Writes the texts of validation pairs in every way and scores them.

    TensorBoard gets, for each way, `written/MODE/METRIC` and `written/MODE/length_ratio` over all `pairs`, a table of
    the first `shown`, which also go to `folder/step_XXXXXX.txt`, and where tokens left the decoder, if they did early.

    Every rank writes the same texts, because sharded parameters are gathered by all ranks together; a board marks the
    rank that keeps them. References are read only after everything is written.

    Args:
        ways: {mode: what writes so}.
        metrics: names in `finetune.score`.
        max_source: as in `write_texts`.
        scores: takes what is measured, under its name in TensorBoard, and `written/pairs`, on how many pairs it was.
    """

    def __init__(
        self,
        engine: Engine,
        ways: Mapping[str, Runner],
        tokenizer: TextTokenizer,
        pairs: Sequence[Pair],
        shown: int,
        metrics: Sequence[str],
        max_source: int,
        every: int,
        folder: Path,
        board: TensorBoard | None,
        note: Note | None,
        scores: dict[str, float],
    ) -> None:
        self.engine, self.ways, self.tokenizer, self.pairs, self.shown = engine, ways, tokenizer, pairs, shown
        self.metrics, self.max_source, self.every = metrics, max_source, every
        self.folder, self.board, self.note, self.scores = folder, board, note, scores

    def after_step(self, report: StepReport) -> None:
        if not report.due(self.every):
            return
        model = self.engine.module.model
        assert isinstance(model, EncoderDecoder)
        sources = [pair.source for pair in self.pairs]
        with self.engine.gathered():
            written = {
                mode: write_texts(
                    model, self.tokenizer, runner, sources, self.max_source, told=lambda written: stop_if_signalled()
                )
                for mode, runner in self.ways.items()
            }
        if self.board is not None:
            self.scores["written/pairs"] = len(self.pairs)
            for mode, made in written.items():
                self._measure(report.step, mode, made, self.board)
            self._show(report.step, written, self.board)

    def _measure(self, step: int, mode: str, written: Written, board: TensorBoard) -> None:
        targets = [pair.target for pair in self.pairs]
        found = score(written.texts, targets, [*self.metrics, "length_ratio"]).values
        told = " ".join(f"{name} {found[name]:.1f}" for name in self.metrics)
        if written.exits:
            found["exit_layer"] = written.exits.mean
            board.histogram(step, written_tag(mode, "exits"), exit_layers(written.exits))
        tagged = {written_tag(mode, name): value for name, value in found.items()}
        board.scalars(step, tagged)
        self.scores.update(tagged)
        if self.note:
            self.note(f"{mode} at step {step}: {told}; {written.report()}")

    def _show(self, step: int, written: Mapping[str, Written], board: TensorBoard) -> None:
        lines = []
        for index, pair in enumerate(self.pairs[: self.shown]):
            texts = {mode: made.texts[index] for mode, made in written.items()}
            named = {"source": pair.source, "target": pair.target, **texts}
            lines.append("\n".join(f"{name:9} {text}" for name, text in named.items()))
        write_text(self.folder / f"step_{step:06d}.txt", "\n\n".join(lines) + "\n")
        for mode, made in written.items():
            shown = zip(self.pairs[: self.shown], made.texts[: self.shown], strict=True)
            rows = [[plain(text) for text in (pair.source, pair.target, own)] for pair, own in shown]
            board.table(step, written_tag(mode), ("source", "target", "written"), rows)


def exit_layers(exits: Exits) -> torch.Tensor:
    """int64 [tokens]: the layer, from 1, at which each written token left."""
    counts = torch.tensor(exits.tokens)
    return torch.arange(1, len(counts) + 1).repeat_interleave(counts)

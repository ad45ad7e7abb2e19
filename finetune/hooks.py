"""What tuning adds to the hooks of pre-training: whole texts, written by the runner's decoder, and their scores."""

from collections.abc import Sequence
from pathlib import Path

from finetune.generate import write_texts
from finetune.runners import Runner
from finetune.scores import score
from finetune.tasks import Pair
from pretrain.data.tokenizer import TextTokenizer
from pretrain.engine import Engine
from pretrain.hooks import Note
from pretrain.loop import StepReport
from pretrain.models import EncoderDecoder
from pretrain.watch.tensorboard import TensorBoard

METRICS = ("rouge1", "rouge2", "rougeL")


class WrittenTexts:
    """Writes the texts of a few validation pairs, to TensorBoard and `folder/step_XXXXXX.txt`, with their ROUGE.

    Every rank writes the same texts, because sharded parameters are gathered by all ranks together; a board marks the
    rank that keeps them. References are read only after everything is written. max_source: as in `write_texts`.
    """

    def __init__(
        self,
        engine: Engine,
        runner: Runner,
        tokenizer: TextTokenizer,
        pairs: Sequence[Pair],
        max_source: int,
        every: int,
        folder: Path,
        board: TensorBoard | None,
        note: Note | None,
    ) -> None:
        self.engine, self.runner, self.tokenizer, self.pairs = engine, runner, tokenizer, pairs
        self.max_source, self.every = max_source, every
        self.folder, self.board, self.note = folder, board, note

    def after_step(self, report: StepReport) -> None:
        if not report.due(self.every):
            return
        model = self.engine.module.model
        assert isinstance(model, EncoderDecoder)
        with self.engine.gathered():
            sources = [pair.source for pair in self.pairs]
            written = write_texts(model, self.tokenizer, self.runner, sources, self.max_source)
        if self.board is None:
            return
        scores = score(written.texts, [pair.target for pair in self.pairs], METRICS).values
        self.board.scalars(report.step, {f"written/{name}": value for name, value in scores.items()})
        blocks = [
            f"source   {pair.source}\ntarget   {pair.target}\nwritten  {text}"
            for pair, text in zip(self.pairs, written.texts, strict=True)
        ]
        text = "\n\n".join(blocks)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"step_{report.step:06d}.txt").write_text(text + "\n", encoding="utf-8")
        self.board.text(report.step, "written", text)
        if self.note:
            values = " ".join(f"{name} {value:.1f}" for name, value in scores.items())
            self.note(f"written at step {report.step}: {values}; {written.report()}")

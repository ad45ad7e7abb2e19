"""Periodic work beside the loop: validate, show text, save, stop. Each hook is told of every update.

A hook that holds a collective runs on every rank; only its output is rank 0's.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from pretrain import signals
from pretrain.checkpoints.commit import disk_errors
from pretrain.distributed import agree, any_rank, shared, sum_counts
from pretrain.engine import Engine
from pretrain.errors import ParlanceError, Requeue
from pretrain.loop import Hook, Progress, StepReport, global_counts, global_means, weighted
from pretrain.objectives import Preview
from pretrain.runs import write_text
from pretrain.saves import Saves
from pretrain.watch.console import terms
from pretrain.watch.tensorboard import TensorBoard, plain

Note = Callable[[str], None]


class AllRanks:
    """The hooks of a run as one, and the end of a save when every rank has written its share.

    What one rank alone meets, as rank 0 a full disk below its board, must not keep it from the collectives of the hooks
    that follow; afterwards it is the error of every rank.

    unfinished: the report of an update whose hooks were cut short, before it was saved; they want to be run again.
    """

    def __init__(self, hooks: Sequence[Hook], folder: Path, saves: Saves) -> None:
        self.hooks, self.folder, self.saves = hooks, folder, saves
        self.unfinished: StepReport | None = None

    def after_step(self, report: StepReport) -> None:
        error: ParlanceError | None = None
        for hook in self.hooks:
            self.unfinished = None if isinstance(hook, Save | StopOnSignal) else report
            try:
                with disk_errors(self.folder):
                    hook.after_step(report)
            except ParlanceError as problem:
                if problem.shared:
                    raise
                error = error or problem
        told = sum_counts({"errors": int(error is not None), "writing": int(self.saves.writing)})
        if told["errors"]:
            agree(error)
        if report.last or not told["writing"]:
            self.saves.commit()


class Validation:
    """Losses on fixed batches, over all ranks. board and note: where rank 0 writes them, None elsewhere.

    scores: takes `valid/total` whenever it is measured.
    """

    def __init__(
        self,
        engine: Engine,
        batches: Sequence[Any],
        every: int,
        board: TensorBoard | None,
        note: Note | None,
        scores: dict[str, float] | None = None,
    ) -> None:
        self.engine, self.batches, self.every, self.board, self.note = engine, batches, every, board, note
        self.scores = {} if scores is None else scores

    def after_step(self, report: StepReport) -> None:
        if not report.due(self.every):
            return
        objective = self.engine.module.objective
        copies = self.engine.world.tensor_parallel
        counts, _ = global_counts(objective, self.batches, copies=copies)
        sums = dict.fromkeys(counts, 0.0)
        for batch in self.batches:
            stop_if_signalled()
            for term, value in self.engine.evaluate([batch]).items():
                sums[term] += float(value)
        losses = global_means(sums, counts, copies)
        values = {f"valid/{term}": value for term, value in losses.items()}
        values["valid/total"] = self.scores["valid/total"] = weighted(losses, objective.weights)
        if self.board:
            self.board.scalars(report.step, values)
        if self.note:
            parts = terms(losses, objective.weights)
            self.note(f"valid at step {report.step}: loss {values['valid/total']:.2f} ({parts})")


class TextSamples:
    """One-step predictions per mode on a fixed batch, to TensorBoard and `folder/step_XXXXXX.txt`.

    Every rank predicts the same batch, because sharded parameters are gathered by all ranks together; a board marks
    the rank that writes.
    """

    def __init__(
        self,
        engine: Engine,
        batch: Any,
        decode: Callable[[Sequence[int]], str],
        every: int,
        folder: Path,
        board: TensorBoard | None,
        limit: int = 4,
    ) -> None:
        self.engine, self.batch, self.decode, self.every = engine, batch, decode, every
        self.folder, self.board, self.limit = folder, board, limit

    def after_step(self, report: StepReport) -> None:
        if not report.due(self.every):
            return
        module = self.engine.module
        device = next(module.parameters()).device
        module.eval()
        with self.engine.gathered(), torch.no_grad():
            previews = module.objective.preview(module.model, self.batch.to(device), self.limit)
        module.train()
        if self.board is None:
            return
        text = "\n\n".join(self._show(preview) for preview in previews)
        write_text(self.folder / f"step_{report.step:06d}.txt", text + "\n")
        for mode in sorted({mode for preview in previews for mode in preview.predicted}):
            rows = [self._row(preview, mode) for preview in previews if mode in preview.predicted]
            target = "target, **bold** where it was hidden" if any("**" in row[1] for row in rows) else "target"
            self.board.table(report.step, f"samples/{mode}", ("source", target, f"{mode}, **bold** where wrong"), rows)

    def _row(self, preview: Preview, mode: str) -> tuple[str, str, str]:
        """Markdown cells; a target that was predicted as a whole has no bold parts."""
        target, predicted, places = preview.target, preview.predicted[mode], set(preview.places[mode])
        hidden = [index in places and len(places) < len(target) - 1 for index in range(len(target))]
        wrong = [one != other for one, other in zip(target, predicted, strict=True)]
        return plain(self.decode(preview.source)), self._bold(target, hidden), self._bold(predicted, wrong)

    def _bold(self, ids: Sequence[int], marked: Sequence[bool]) -> str:
        parts = []
        for bold, run in groupby(zip(ids, marked, strict=True), key=lambda pair: pair[1]):
            text = plain(self.decode([token for token, _ in run]))
            word = text.strip()  # markdown wants the stars right beside it
            parts.append(text.replace(word, f"**{word}**") if bold and word else text)
        return "".join(parts)

    def _show(self, preview: Preview) -> str:
        lines = {"source": preview.source, "target": preview.target, **preview.predicted}
        return "\n".join(f"{name:10} {self.decode(ids)}" for name, ids in lines.items())


class Save:
    """Saves every `every` updates and at the last one; `write` begins a checkpoint."""

    def __init__(self, every: int, write: Callable[[Progress], None]) -> None:
        self.every, self.write = every, write
        self.saved_step = -1

    def after_step(self, report: StepReport) -> None:
        if report.due(self.every):
            self.now(report.progress)

    def now(self, progress: Progress) -> None:
        """Saves unless this very step is saved already."""
        if self.saved_step != progress.step:
            self.write(progress)
            self.saved_step = progress.step


class StopOnSignal:
    """A signal to any rank: all ranks save together after this update and leave with `Requeue`."""

    def __init__(self, save: Save) -> None:
        self.save = save

    def after_step(self, report: StepReport) -> None:
        if not report.last:
            try:
                stop_if_signalled()
            except Requeue:
                self.save.now(report.progress)
                raise stopped(report.step) from None


def stop_if_signalled() -> None:
    """Raises Requeue on every rank where a signal came to one; for work that may be long, collective."""
    if any_rank(signals.received()):
        raise shared(Requeue("stopped by a signal"))


def stopped(step: int) -> Requeue:
    """The error of a run that was stopped by a signal when so many updates were saved."""
    saved = f"saved step {step}" if step else "before the first update"
    return shared(Requeue(f"stopped by a signal, {saved}: run the same command again to continue"))


class Skips:
    """Tells `note` of every update that fp16 skipped."""

    def __init__(self, note: Callable[[StepReport], None]) -> None:
        self.note = note

    def after_step(self, report: StepReport) -> None:
        if not report.applied:
            self.note(report)

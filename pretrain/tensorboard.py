"""TensorBoard: one curve over all restarts.

Every value belongs to one update, never to a mean since the last reading, so that a resumed run writes the curve the
uninterrupted one would have written; `purge_step` hides what a killed life wrote beyond its last checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pretrain.flatten import flatten
from pretrain.loop import StepReport
from pretrain.progress import Meter

MEBIBYTE = 2**20


class TensorBoard:
    """Hook that writes the scalars of every `every`-th update into `folder`; others add theirs through it."""

    def __init__(self, folder: Path, first_step: int, every: int) -> None:
        self.every, self.meter, self.first_step = every, Meter(), first_step
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self.process = psutil.Process()

    def after_step(self, report: StepReport) -> None:
        self.meter.add(report)
        if not report.due(self.every):
            return
        rates = self.meter.read()
        # A term of weight 0 is measured but not trained: it stands apart from the losses.
        values = {f"{'loss' if report.weights[term] else 'watched'}/{term}": x for term, x in report.losses.items()}
        values |= {
            "loss/total": report.total,
            "train/lr": report.lr,
            "train/grad_norm": report.grad_norm,
            "train/tokens": float(report.progress.tokens),
            "speed/tokens_per_second": rates.tokens_per_second,
            "speed/samples_per_second": rates.samples_per_second,
            "speed/data_wait_fraction": rates.wait_fraction,
            "memory/rss_mebibytes": self.process.memory_info().rss / MEBIBYTE,
        }
        if torch.cuda.is_available():
            values["memory/cuda_peak_mebibytes"] = torch.cuda.max_memory_allocated() / MEBIBYTE
        if report.loss_scale is not None:
            values["train/loss_scale"] = report.loss_scale
        if report.counts.get("nar") and report.tokens:
            values["data/mask_ratio"] = report.counts["nar"] / report.tokens
        self.scalars(report.step, values)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes and flushes, so that a kill after a checkpoint loses nothing that came before it."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def text(self, step: int, tag: str, text: str) -> None:
        """A block that keeps its line breaks in TensorBoard's markdown view."""
        self.writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)
        self.writer.flush()

    def config(self, text: str, values: Mapping[str, Any]) -> None:
        """The configuration of this life as text, and its plain values for the HPARAMS tab."""
        self.text(self.first_step + 1, "config", text)
        plain = {key: value for key, value in flatten(values).items() if isinstance(value, bool | int | float | str)}
        for summary in hparams(plain, {"loss/total": 0.0}):
            self.writer._get_file_writer().add_summary(summary, self.first_step + 1)

    def close(self) -> None:
        self.writer.close()

"""TensorBoard: one curve over all restarts.

Every value belongs to one update, never to a mean since the last reading, so that a resumed run writes the curve the
uninterrupted one would have written; `purge_step` hides what a killed life wrote beyond its last checkpoint.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pretrain.flatten import flatten
from pretrain.loop import StepReport
from pretrain.watch.console import Meter

MEBIBYTE, TERA = 2**20, 1e12
# What markdown, and HTML below it, would take for its own.
SPECIAL = {ord(sign): f"&#{ord(sign)};" for sign in "\\`*_{}[]()<>#+-.!|&~:\"'"}


class TensorBoard:
    """Hook that writes the scalars of every `every`-th update into `folder`; others add theirs through it.

    peak: operations a second of all ranks together, for MFU; None leaves it out.
    """

    def __init__(self, folder: Path, first_step: int, every: int, peak: float | None = None) -> None:
        self.every, self.meter, self.first_step, self.peak = every, Meter(), first_step, peak
        self.folder, self.skips = folder, 0
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        threading.excepthook = _told_by_the_next_write
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
        if self.peak:
            values["speed/teraflops_per_second"] = rates.flops / TERA
            values["speed/mfu"] = rates.flops / self.peak
        if torch.cuda.is_available():
            values["memory/cuda_peak_allocated_mebibytes"] = torch.cuda.max_memory_allocated() / MEBIBYTE
            values["memory/cuda_peak_reserved_mebibytes"] = torch.cuda.max_memory_reserved() / MEBIBYTE
        if report.loss_scale is not None:
            values["train/loss_scale"] = report.loss_scale
        if report.facts.get("masked") and report.tokens:
            values["train/mask_ratio"] = report.facts["masked"] / report.tokens
        self.scalars(report.step, values)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes and flushes, so that a kill after a checkpoint loses nothing that came before it."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def began(self, restarts: int, skips: int) -> None:
        """Draws that a life begins: `events/restarts`, a point at the first update of each but the first."""
        self.skips = skips
        if restarts:
            self.scalars(self.first_step + 1, {"events/restarts": float(restarts)})

    def skipped(self, step: int, skips: int) -> None:
        """Draws `events/skipped`, how many updates were not applied so far, where there are new ones."""
        if skips != self.skips:
            self.scalars(step, {"events/skipped": float(skips)})
        self.skips = skips

    def back_to(self, first_step: int) -> None:
        """The run goes on from an earlier step: what was drawn behind it is hidden."""
        self.writer.close()
        time.sleep(1.1)  # readers order event files by name, and names tell seconds
        self.writer = SummaryWriter(str(self.folder), purge_step=first_step + 1)

    def text(self, step: int, tag: str, text: str) -> None:
        """A block that keeps its line breaks in TensorBoard's markdown view."""
        self.writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)
        self.writer.flush()

    def table(self, step: int, tag: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A markdown table; cells are markdown, so foreign text goes through `plain` first."""
        lines = [header, ["---"] * len(header), *rows]
        self.writer.add_text(tag, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
        self.writer.flush()

    def histogram(self, step: int, tag: str, values: torch.Tensor) -> None:
        """How often each whole number occurs, a bar each."""
        if len(values):
            edges = np.arange(int(values.min()), int(values.max()) + 2) - 0.5
            self.writer.add_histogram(tag, values.numpy(), step, bins=edges)
            self.writer.flush()

    def picture(self, tag: str, image_HWC: np.ndarray) -> None:
        """An image of this life of the run, uint8 [height, width, 3]."""
        self.writer.add_image(tag, image_HWC, self.first_step, dataformats="HWC")
        self.writer.flush()

    def config(self, text: str, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The configuration of this life as text, and in the HPARAMS tab with the last value of each of `metrics`."""
        self.text(self.first_step + 1, "config", text)
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flatten(values).items()
            if value is not None
        }
        for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
            self.writer._get_file_writer().add_summary(summary, self.first_step + 1)

    def close(self) -> None:
        """Ends the curve; a disk that refuses has said so before, and must not hide the error that ends the run."""
        with suppress(OSError):
            self.writer.close()
        threading.excepthook = threading.__excepthook__


def _told_by_the_next_write(args: threading.ExceptHookArgs) -> None:
    """An error of the disk, met by the writer's thread, is raised by the next call; here it would be a traceback."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def plain(text: str) -> str:
    """`text` as markdown that shows it as it is, on one line; what cannot be printed becomes a space."""
    return "".join(sign if sign.isprintable() else " " for sign in text).translate(SPECIAL)

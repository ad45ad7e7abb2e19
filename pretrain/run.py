"""One life of a run, of pre-training or of tuning: its folder, what it prints, its periodic work, and how it ends."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel

from pretrain import config, distributed, rng, runs
from pretrain.checkpoints import checkpoint
from pretrain.checkpoints.checkpoint import read_progress
from pretrain.checkpoints.commit import Store, disk_errors
from pretrain.config import EngineConfig, OptimConfig, TrainConfig
from pretrain.cost import flops
from pretrain.cost.peak import device_peak
from pretrain.data.stream import SampleStream
from pretrain.distributed import World, together
from pretrain.engine import Engine
from pretrain.errors import CheckpointError, ParlanceError, Requeue
from pretrain.hooks import Save, Skips, StopOnSignal, Validation
from pretrain.loop import Hook, Progress, StepReport, fit
from pretrain.models import EncoderDecoder
from pretrain.optim import learning_rate
from pretrain.signals import Signals
from pretrain.watch import cosine
from pretrain.watch.console import Console, Meter, short
from pretrain.watch.cosine import GradientCosine
from pretrain.watch.exits import ExitRamps
from pretrain.watch.tensorboard import TensorBoard

Pictures = Callable[[], Mapping[str, np.ndarray]]
PREVIEWS, RAMP_SAMPLES = 4, 16


class Settings(Protocol):
    """What every configuration of a run has."""

    @property
    def run_dir(self) -> Path: ...
    @property
    def seed(self) -> int: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def train(self) -> TrainConfig: ...


class Run:
    """Only rank 0 has a console and a board; every rank runs the same hooks.

    Args:
        settings: a pydantic model with the sections of `Settings`.
        data: hashes of the training data; a resume on other data is refused.
        given_by: the configuration key that chooses the data, for that error.
        fixed: what each checkpoint keeps of the configuration, from `runs.fixed_values`.
        stack: closed when the run ends, whatever happens.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        engine: Engine,
        stream: SampleStream,
        store: Store,
        data: Mapping[str, Any],
        given_by: str,
        fixed: Mapping[str, Any],
        stack: ExitStack,
    ) -> None:
        cosine.check(settings.train.cosine_every, settings.engine, engine.module.objective)
        self.settings, self.world, self.engine, self.stream, self.store = settings, world, engine, stream, store
        self.data, self.fixed, self.stack, self.folder = data, fixed, stack, settings.run_dir
        self.notes: list[str] = []
        self.progress = self.reached = self._resume(given_by)
        self.events = runs.Events(self.folder)
        self.environment = runs.describe_environment(world, self.model.backend)
        self.meter = Meter()
        self.scores: dict[str, float] = {}  # what rank 0 has measured since the last update
        self.spare: checkpoint.Spare = lambda store: ()
        self.console: Console | None = None
        self.board: TensorBoard | None = None

    @property
    def model(self) -> EncoderDecoder:
        model = self.engine.module.model
        assert isinstance(model, EncoderDecoder)
        return model

    @property
    def note(self) -> Callable[[str], None] | None:
        """Prints a line between the progress lines; None where there is no console."""
        return self.console.note if self.console else None

    def announce(
        self,
        repaired: Sequence[str],
        changed: Mapping[str, Any],
        derived: Sequence[str],
        pictures: Pictures = dict,
        metrics: Sequence[str] = (),
    ) -> None:
        """Rank 0 prints configuration and derived lines, writes config.yaml and env.json, opens console and board.

        pictures: draws what TensorBoard shows of this life, called on rank 0 alone. metrics: what its HPARAMS tab
        compares besides losses.

        Collective. Raises DiskError where the disk is full, over quota or read-only.
        """

        def announce() -> None:
            with disk_errors(self.folder):  # the console may be a file too
                self._announce(repaired, changed, derived, pictures, metrics)

        together(lambda: None if self.world.rank else announce())

    def _announce(
        self,
        repaired: Sequence[str],
        changed: Mapping[str, Any],
        derived: Sequence[str],
        pictures: Pictures,
        metrics: Sequence[str],
    ) -> None:
        assert isinstance(self.settings, BaseModel)
        text, step, train = config.dump(self.settings), self.progress.step, self.settings.train
        watch = f"watch: tensorboard --logdir {self.folder / runs.BOARD}"
        print(text.rstrip(), *repaired, *self.notes, *derived, watch, sep="\n", file=sys.stderr, flush=True)
        runs.write_text(self.folder / runs.CONFIG, text)
        runs.write_json(self.folder / runs.ENVIRONMENT, self.environment)
        self.events.add("resume" if step else "start", step, repaired=repaired, changed=changed, **self.environment)
        peak = device_peak(self.world.device, self.settings.engine.precision)
        everywhere = peak.flops * self.world.size
        print(f"mfu: of {short(everywhere)}FLOP/s on all ranks ({peak.source})", file=sys.stderr, flush=True)
        self.console = Console(step, train.steps, train.log_every, peak=everywhere)
        self.stack.callback(self.console.close)
        self.board = TensorBoard(self.folder / runs.BOARD, step, train.log_every, everywhere)
        self.stack.callback(self.board.close)
        losses = ["loss/total", *(["valid/total"] if train.validate_every and self.stream.valid else [])]
        self.board.config(text, self.settings.model_dump(mode="json", exclude={"name", "runs"}), [*losses, *metrics])
        for name, image_HWC in pictures().items():
            self.board.picture(name, image_HWC)

    def train(self, texts: Hook | None) -> Progress:
        """Trains to the last update. texts: the hook that shows what the model writes.

        Signals are caught from here on: before, there is nothing to save, and a rank that waits for the others must
        not outlive one.
        """
        steps = self.settings.train.steps
        rate = partial(learning_rate, config=self.settings.optim, total_steps=steps)
        windows = self.stream.windows(self.progress.position, self.world.data_rank, self.world.data_size)
        with Signals() as signals, self._journal(), closing(windows):  # a generator: its end ends its workers
            hooks = AllRanks(together(lambda: self._hooks(signals, texts)), self.folder)
            progress = fit(self.engine, windows, rate, steps, self.progress, [hooks], flops.facts(self.model))
        if self.console is not None:
            self.console.note(f"finished at step {progress.step}, saved in {self.folder}; more: train.steps=...")
        return progress

    def _hooks(self, signals: Signals, texts: Hook | None) -> list[Hook]:
        """Periodic work in the order it is done after an update; saving comes last, when all else is on disk."""
        train = self.settings.train
        hooks: list[Hook] = [self, *(hook for hook in (self.console, self.board) if hook)]
        if train.validate_every and self.stream.valid is not None:
            share = self.world.data_rank, self.world.data_size
            batches = self.stream.fixed_batches(train.validate_batches, *share)
            hooks.append(Validation(self.engine, batches, train.validate_every, self.board, self.note, self.scores))
        if train.cosine_every:
            hooks.append(GradientCosine(self.engine, self.stream.preview(PREVIEWS), train.cosine_every, self.board))
        if train.sample_every and "hard_exit" in self.engine.module.objective.modes:
            hooks.append(ExitRamps(self.engine, self.stream.preview(RAMP_SAMPLES), train.sample_every, self.board))
        save = Save(train.save_every, self._save)
        return [*hooks, *([texts] if texts else []), Skips(self._skipped), save, StopOnSignal(signals, save)]

    def after_step(self, report: StepReport) -> None:
        """A hook itself, the first: adds up what updates take, for the record of the next save; forgets old scores."""
        self.meter.add(report)
        self.scores.clear()

    def _save(self, progress: Progress) -> None:
        """Commits a checkpoint and deletes those that `train.keep` no longer covers; collective.

        One that `train.save_every` asks for also keeps what was measured at its step.
        """
        train = self.settings.train
        content = {**progress.to_json(), "data": self.data, "kernels": self.model.backend, "fixed": self.fixed}
        if progress.step % train.save_every == 0 or progress.step == train.steps:
            content["scores"] = {name: value for name, value in self.scores.items() if math.isfinite(value)}
        began, spent = time.perf_counter(), self.meter
        checkpoint.save(self.store, progress.step, self.engine, self.world, content, train.keep, self.spare)
        self.reached, self.meter = progress, Meter()
        times = {
            "seconds": spent.seconds,
            "wait_seconds": spent.wait_seconds,
            "save_seconds": time.perf_counter() - began,
        }
        self._record("save", progress.step, **{name: round(value, 3) for name, value in times.items()})

    def _resume(self, given_by: str) -> Progress:
        """Restores the last verified checkpoint; without one, gives each rank dropout of its own and starts at 0."""
        saved = checkpoint.load_latest(self.store, self.engine, self.world, self.settings.seed)
        if saved is None:
            rng.seed(self.settings.seed, 0, self.world.data_rank)
            return Progress()
        kernels = self.model.backend
        if saved.get("kernels") != kernels:
            self.notes.append(f"kernels were {saved.get('kernels')}, are {kernels}: the run goes on, not bit by bit")

        def check() -> Progress:
            runs.check_data(saved.get("data"), self.data, given_by, self.folder)
            return Progress.from_json(saved)

        return together(check)

    @contextmanager
    def _journal(self) -> Iterator[None]:
        """Writes into events.jsonl how training ended."""
        try:
            yield
        except Requeue:
            self._record("stop", self.reached.step)
            raise
        except ParlanceError as error:
            if self.world.rank == 0:
                with suppress(ParlanceError):  # a full disk is told once
                    self.events.add("error", self.reached.step, kind=type(error).__name__, message=str(error))
            raise
        self._record("finish", self.settings.train.steps)

    def _record(self, event: str, step: int, **details: Any) -> None:
        """Rank 0 adds a line to events.jsonl; collective."""
        distributed.rank_zero(lambda: self.events.add(event, step, **details))

    def _skipped(self, report: StepReport) -> None:
        self._record("skip", report.step, loss_scale=report.loss_scale)


class AllRanks:
    """The hooks of a run as one.

    What one rank alone meets, as rank 0 a full disk below its board, must not keep it from the collectives of the hooks
    that follow; afterwards it is the error of every rank.
    """

    def __init__(self, hooks: Sequence[Hook], folder: Path) -> None:
        self.hooks, self.folder = hooks, folder

    def after_step(self, report: StepReport) -> None:
        error: ParlanceError | None = None
        for hook in self.hooks:
            try:
                with disk_errors(self.folder):
                    hook.after_step(report)
            except ParlanceError as problem:
                if problem.shared:
                    raise
                error = error or problem
        distributed.agree(error)


def claim(
    settings: Settings,
    store: Store,
    complete: Callable[[Any], BaseModel],
    fixed: Sequence[str],
    free: Sequence[str] = (),
) -> dict[str, Any]:
    """What changed since the run was last started; raises where this configuration may not continue it.

    What the newest checkpoint keeps of its configuration goes before config.yaml, which people can edit.

    complete: fills in the defaults of options that config.yaml or checkpoint may be too old to hold.
    """
    assert isinstance(settings, BaseModel)
    newest = store.latest() if settings.train.resume == "auto" else None
    if newest is None and not store.commits():
        return {}
    if settings.train.resume == "never":
        raise CheckpointError(
            f"run `{settings.run_dir}` has checkpoints and `train.resume` is never: choose another `name`"
        )
    before = runs.read_config(settings.run_dir, type(settings))
    if before is None:
        raise CheckpointError(
            f"`{settings.run_dir / runs.CONFIG}` must be there: without it nobody knows what its checkpoints were "
            "trained as; bring it back, or choose another `name`"
        )
    saved = read_progress(newest)["progress"].get("fixed") if newest else None
    past = complete(runs.with_fixed(complete(before), saved, free))
    return runs.check_continues(settings, past, settings.run_dir, fixed, free)

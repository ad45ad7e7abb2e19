"""One life of a run, of pre-training or of tuning: its folder, what it prints, its periodic work, and how it ends."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel

from pretrain import config, distributed, rng, runs, slurm
from pretrain.checkpoints import checkpoint
from pretrain.checkpoints.commit import Store, disk_errors
from pretrain.checkpoints.saver import Saver, Spare
from pretrain.config import EngineConfig, OptimConfig, TrainConfig
from pretrain.cost import flops
from pretrain.cost.peak import device_peak
from pretrain.data.stream import SampleStream
from pretrain.distributed import World, together
from pretrain.engine import Engine
from pretrain.errors import DiskError, NonFiniteError, ParlanceError, Requeue
from pretrain.faults import Policy
from pretrain.hooks import AllRanks, Save, Skips, StopOnSignal, Validation, stopped
from pretrain.loop import Hook, Progress, StepReport, Window, fit
from pretrain.models import EncoderDecoder
from pretrain.optim import learning_rate
from pretrain.saves import Saves
from pretrain.signals import Signals
from pretrain.watch import cosine
from pretrain.watch.console import Console, short
from pretrain.watch.cosine import GradientCosine
from pretrain.watch.exits import ExitRamps
from pretrain.watch.slow import SlowRanks
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
        self.events = runs.Events(self.folder)
        self.given_by, self.skips = given_by, 0
        self.policy = Policy(settings.train, self._bad_update)
        self.unfinished: StepReport | None = None  # of the update that `progress` stands behind
        self.progress = self.last = self._resume()
        self.environment = runs.describe_environment(world, self.model.backend)
        self.scores: dict[str, float] = {}  # what rank 0 has measured since the last update
        self.spare: Spare = lambda store: ()
        saver = Saver(store, engine, world, settings.train.keep, lambda store: self.spare(store))
        self.saves = Saves(saver, self.events, self.progress, settings.train.async_save)
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
        shown = text.rstrip() if changed or not step else f"configuration: {self.folder / runs.CONFIG}, as it was"
        print(shown, *repaired, *self.notes, *derived, watch, sep="\n", file=sys.stderr, flush=True)
        runs.write_text(self.folder / runs.CONFIG, text)
        environment = {**self.environment, **slurm.describe(os.environ)}
        runs.write_json(self.folder / runs.ENVIRONMENT, environment)
        self.events.add("resume" if step else "start", step, repaired=repaired, changed=changed, **environment)
        peak = device_peak(self.world.device, self.settings.engine.precision)
        everywhere = peak.flops * self.world.size
        print(f"mfu: of {short(everywhere)}FLOP/s on all ranks ({peak.source})", file=sys.stderr, flush=True)
        self.console = Console(step, train.steps, train.log_every, peak=everywhere)
        self.stack.callback(self.console.close)
        self.board = TensorBoard(self.folder / runs.BOARD, self._drawn, train.log_every, everywhere)
        self.stack.callback(self.board.close)
        past = [event["event"] for event in self._past()]
        self.skips = len(past) - past.count("resume")
        self.board.began(past.count("resume"), self.skips)
        losses = ["loss/total", *(["valid/total"] if train.validate_every and self.stream.valid else [])]
        self.board.config(text, self.settings.model_dump(mode="json", exclude={"name", "runs"}), [*losses, *metrics])
        for name, image_HWC in pictures().items():
            self.board.picture(name, image_HWC)

    def train(self, texts: Hook | None) -> Progress:
        """Trains to the last update. texts: the hook that shows what the model writes.

        Signals are remembered from here on: before, there is nothing to save, and a rank that waits for the others must
        not outlive one.
        """
        train, say = self.settings.train, self.note or print
        with (
            Signals() as signals,
            self._journal(),
            self.saves.patient(train.disk_patience, say, lambda: signals.received),
        ):
            save = Save(train.save_every, self._save)
            hooks = AllRanks(together(lambda: self._hooks(save, texts)), self.folder, self.saves)
            while True:
                try:
                    progress = self._fit(signals, hooks)
                    break
                except NonFiniteError as error:
                    self._rewind(error)
                    save.saved_step = -1
                except Requeue:
                    self.unfinished = hooks.unfinished
                    if self.last.step > self.saves.reached.step:
                        save.now(self.last)
                        self.saves.commit()
                    raise stopped(self.saves.reached.step) from None
        if self.console is not None:
            self.console.note(f"finished at step {progress.step}, saved in {self.folder}; more: train.steps=...")
        return progress

    def _fit(self, signals: Signals, hooks: AllRanks) -> Progress:
        """From `progress` to the last update; first what is left to do after the update before, if it was cut short."""
        steps, rate = self.settings.train.steps, self.settings.optim
        if self.unfinished is not None:
            report, self.unfinished = self.unfinished, None
            self.policy.forget(report)
            hooks.after_step(replace(report, last=report.step == steps))
        windows = self.stream.windows(self.progress.position, self.world.data_rank, self.world.data_size)
        with closing(windows):  # a generator: its end ends its workers
            read, facts = self._awaited(windows, signals), flops.facts(self.model)
            rates = partial(learning_rate, config=rate, total_steps=steps)
            return fit(self.engine, read, rates, steps, self.progress, [hooks], facts, self.policy)

    def _awaited(self, windows: Iterator[Window], signals: Signals) -> Iterator[Window]:
        """`windows` without those that rewinding has left out; a signal ends the wait for the next one."""
        while True:
            with signals.interruptible():
                window = next(windows)
            if window.first not in self.policy.jumped:
                yield window

    def _hooks(self, save: Save, texts: Hook | None) -> list[Hook]:
        """Periodic work in the order it is done after an update; saving comes last, when all else is on disk."""
        train = self.settings.train
        hooks: list[Hook] = [self, self.policy, *(hook for hook in (self.console, self.board) if hook)]
        if train.validate_every and self.stream.valid is not None:
            share = self.world.data_rank, self.world.data_size
            batches = self.stream.fixed_batches(train.validate_batches, *share)
            hooks.append(Validation(self.engine, batches, train.validate_every, self.board, self.note, self.scores))
        if train.cosine_every:
            hooks.append(GradientCosine(self.engine, self.stream.preview(PREVIEWS), train.cosine_every, self.board))
        if train.sample_every and "hard_exit" in self.engine.module.objective.modes:
            hooks.append(ExitRamps(self.engine, self.stream.preview(RAMP_SAMPLES), train.sample_every, self.board))
        slow = SlowRanks(self.world, train.log_every, self._slow)
        return [*hooks, *([texts] if texts else []), Skips(self._skipped), slow, save, StopOnSignal(save)]

    def after_step(self, report: StepReport) -> None:
        """A hook itself, the first: adds up what updates take, for the record of the next save; forgets old scores."""
        self.last = report.progress
        self.saves.meter.add(report)
        self.scores.clear()
        if self.board is not None:
            self.board.skipped(report.step, self.skips)

    def _save(self, progress: Progress) -> None:
        """Begins a checkpoint; collective. One that `train.save_every` asks for keeps what was measured at its step."""
        train = self.settings.train
        content = {"data": self.data, "kernels": self.model.backend, "fixed": self.fixed, **self.policy.to_json()}
        if self.unfinished is not None:
            content["unfinished"] = self.unfinished.to_json()
        elif progress.step % train.save_every == 0 or progress.step == train.steps:
            content["scores"] = {name: value for name, value in self.scores.items() if math.isfinite(value)}
        self.saves.begin(progress, content)

    def _resume(self) -> Progress:
        """Restores the last verified checkpoint; without one, gives each rank dropout of its own and starts at 0."""
        saved = checkpoint.load_latest(self.store, self.engine, self.world, self.settings.seed)
        self.policy.past(distributed.rank_zero(self._past))
        if saved is None:
            rng.seed(self.settings.seed, 0, self.world.data_rank)
            return Progress()
        kernels = self.model.backend
        if saved.get("kernels") != kernels:
            self.notes.append(f"kernels were {saved.get('kernels')}, are {kernels}: the run goes on, not bit by bit")

        def check() -> Progress:
            runs.check_data(saved.get("data"), self.data, self.given_by, self.folder)
            self.policy.restore(saved)
            self.unfinished = StepReport.from_json(saved["unfinished"]) if "unfinished" in saved else None
            return Progress.from_json(saved)

        return together(check)

    def _rewind(self, error: NonFiniteError) -> None:
        """Back to the last verified checkpoint, if the policy and the disk allow it; raises `error` if not."""
        self.saves.commit()
        at = self.saves.reached.step
        if not at or not self.policy.rewind(error, at):
            raise error
        self._record("rewind", at, samples=list(error.samples) if error.samples else None, message=str(error))
        self.progress = self.last = self._resume()
        self.saves.back_to(self.progress)
        self.skips += 1
        if self.board is not None and self.console is not None:
            self.board.back_to(self._drawn)
            self.console.back_to(self.progress.step, f"{error}; going on from step {self.progress.step}")

    def _past(self) -> list[dict[str, Any]]:
        """Events of earlier lives that matter to this one."""
        found = runs.read_events(self.folder) if self.events.path.exists() else []
        return [event for event in found if event.get("event") in ("skip", "rewind", "resume")]

    @property
    def _drawn(self) -> int:
        """The last update whose values stay on the board."""
        return self.progress.step - (self.unfinished is not None)

    @contextmanager
    def _journal(self) -> Iterator[None]:
        """Writes into events.jsonl how training ended."""
        try:
            yield
        except Requeue:
            with suppress(DiskError):  # what stopped is saved, or has said why it is not
                self._record("stop", self.saves.reached.step)
            raise
        except ParlanceError as error:
            if self.world.rank == 0:
                with suppress(ParlanceError):  # a full disk is told once
                    self.events.add("error", self.saves.reached.step, kind=type(error).__name__, message=str(error))
            raise
        self._record("finish", self.settings.train.steps)

    def _record(self, event: str, step: int, **details: Any) -> None:
        """Rank 0 adds a line to events.jsonl; collective."""
        distributed.rank_zero(lambda: self.events.add(event, step, **details))

    def _bad_update(self, event: str, message: str, **details: Any) -> None:
        self.skips += 1
        if self.note:
            self.note(f"{message}; its samples are jumped over")
        self._record(event, self.last.step + 1, message=message, **details)

    def _slow(self, step: int, rank: int, host: str, seconds: float, data: float, usual: float) -> None:
        if self.note:
            why = f"{seconds:.3g} s an update, {data:.3g} of them for data, the others {usual:.3g} s"
            self.note(f"rank {rank} on {host} is slow: {why}")
        times = {"seconds": round(seconds, 4), "data_seconds": round(data, 4), "others_seconds": round(usual, 4)}
        self._record("slow", step, rank=rank, slow_host=host, **times)

    def _skipped(self, report: StepReport) -> None:
        self.skips += 1
        self._record("skip", report.step, loss_scale=report.loss_scale)

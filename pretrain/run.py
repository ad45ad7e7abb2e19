"""One life of a run, of pre-training or of tuning: its folder, what it prints, its periodic work, and how it ends."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from pretrain import checkpoint, config, distributed, rng, runs
from pretrain.commit import Store
from pretrain.config import EngineConfig, OptimConfig, TrainConfig
from pretrain.data.stream import SampleStream
from pretrain.distributed import World
from pretrain.engine import Engine
from pretrain.errors import CheckpointError, DataError, ParlanceError, Requeue
from pretrain.hooks import Save, Signals, Skips, StopOnSignal, Validation
from pretrain.loop import Hook, Progress, StepReport, fit
from pretrain.models import EncoderDecoder
from pretrain.optim import learning_rate
from pretrain.progress import Console
from pretrain.tensorboard import TensorBoard

MadeT = TypeVar("MadeT")


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
        fingerprint: hash of the training data; a resume on other data is refused.
        given_by: the configuration key that chooses the data, for that error.
        stack: closed when the run ends, whatever happens.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        engine: Engine,
        stream: SampleStream,
        store: Store,
        fingerprint: str,
        given_by: str,
        stack: ExitStack,
    ) -> None:
        self.settings, self.world, self.engine, self.stream, self.store = settings, world, engine, stream, store
        self.fingerprint, self.stack, self.folder = fingerprint, stack, settings.run_dir
        self.progress = self.reached = self._resume(given_by)
        self.events = runs.Events(self.folder)
        self.environment = runs.describe_environment(world, self.model.backend)
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

    def announce(self, repaired: Sequence[str], changed: Mapping[str, Any], derived: Sequence[str]) -> None:
        """Rank 0 writes config.yaml and env.json, prints what was derived and opens console and board."""
        if self.world.rank:
            return
        assert isinstance(self.settings, BaseModel)
        text, step, train = config.dump(self.settings), self.progress.step, self.settings.train
        runs.write_text(self.folder / runs.CONFIG, text)
        runs.write_json(self.folder / runs.ENVIRONMENT, self.environment)
        for line in (*repaired, *derived, f"watch: tensorboard --logdir {self.folder / runs.BOARD}"):
            print(line, file=sys.stderr, flush=True)
        self.events.add("resume" if step else "start", step, repaired=repaired, changed=changed, **self.environment)
        self.console = Console(step, train.steps, train.log_every)
        self.stack.callback(self.console.close)
        self.board = TensorBoard(self.folder / runs.BOARD, step, train.log_every)
        self.stack.callback(self.board.close)
        self.board.config(text, self.settings.model_dump(mode="json"))

    def train(self, signals: Signals, texts: Hook | None) -> Progress:
        """Trains to the last update. texts: the hook that shows what the model writes."""
        steps = self.settings.train.steps
        rate = partial(learning_rate, config=self.settings.optim, total_steps=steps)
        windows = self.stream.windows(self.progress.position, self.world.rank, self.world.size)
        with self._journal(), closing(windows):  # a generator: its end ends its workers
            return fit(self.engine, windows, rate, steps, self.progress, self._hooks(signals, texts))

    def _hooks(self, signals: Signals, texts: Hook | None) -> list[Hook]:
        """Periodic work in the order it is done after an update; saving comes last, when all else is on disk."""
        train = self.settings.train
        hooks: list[Hook] = [hook for hook in (self.console, self.board) if hook]
        if train.validate_every and self.stream.valid is not None:
            batches = self.stream.fixed_batches(train.validate_batches, self.world.rank, self.world.size)
            hooks.append(Validation(self.engine, batches, train.validate_every, self.board, self.note))
        save = Save(train.save_every, self._save)
        return [*hooks, *([texts] if texts else []), Skips(self._skipped), save, StopOnSignal(signals, save)]

    def _save(self, progress: Progress) -> None:
        """Commits a checkpoint and deletes those that `train.keep` no longer covers; collective."""
        content = {**progress.to_json(), "data": self.fingerprint}
        checkpoint.save(self.store, progress.step, self.engine, self.world, content, keep=self.settings.train.keep)
        self.reached = progress
        self._record("save", progress.step)

    def _resume(self, given_by: str) -> Progress:
        """Restores the last verified checkpoint; without one, gives each rank dropout of its own and starts at 0."""
        saved = checkpoint.load_latest(self.store, self.engine, self.world, self.settings.seed)
        if saved is None:
            rng.seed(self.settings.seed, 0, self.world.rank)
            return Progress()
        if saved.get("data") != self.fingerprint:
            raise DataError(
                f"`{given_by}` must give the data that run `{self.folder}` began with ({saved.get('data')!s:.12}), "
                f"it gives {self.fingerprint:.12}"
            )
        return Progress.from_json(saved)

    @contextmanager
    def _journal(self) -> Iterator[None]:
        """Writes into events.jsonl how training ended."""
        try:
            yield
        except Requeue:
            self._record("stop", self.reached.step)
            raise
        except ParlanceError as error:
            self._record("error", self.reached.step, kind=type(error).__name__, message=str(error))
            raise
        self._record("finish", self.settings.train.steps)

    def _record(self, event: str, step: int, **details: Any) -> None:
        if self.world.rank == 0:
            self.events.add(event, step, **details)

    def _skipped(self, report: StepReport) -> None:
        self._record("skip", report.step, loss_scale=report.loss_scale)


def claim(settings: Settings, store: Store, fixed: Sequence[str], free: Sequence[str] = ()) -> dict[str, Any]:
    """What changed since the run was last started; raises where this configuration may not continue it."""
    assert isinstance(settings, BaseModel)
    before = runs.read_config(settings.run_dir, type(settings))
    if before is None or not store.commits():
        return {}
    if settings.train.resume == "never":
        raise CheckpointError(
            f"run `{settings.run_dir}` has checkpoints and `train.resume` is never: choose another `name`"
        )
    return runs.check_continues(settings, before, settings.run_dir, fixed, free)


def together(make: Callable[[], MadeT]) -> MadeT:
    """Runs `make` on every rank; a ParlanceError on any of them is raised on all."""
    made, error = None, None
    try:
        made = make()
    except ParlanceError as problem:
        error = problem
    distributed.agree(error)
    assert made is not None
    return made


@contextmanager
def told_once(rank: int, *local: type[ParlanceError]) -> Iterator[None]:
    """For errors that every rank meets: rank 0 raises, the others just exit. Those of `local` kinds all raise."""
    try:
        yield
    except ParlanceError as error:
        if rank and not isinstance(error, local):
            raise SystemExit(error.exit_code) from None
        raise

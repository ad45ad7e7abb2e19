"""`train`: configuration -> data -> model -> engine -> resume -> fit. The same command starts and continues a run."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pretrain import checkpoint, config, distributed, rng, runs
from pretrain.assemble import build_module, build_stream, complete_config, readable
from pretrain.commit import Store
from pretrain.config import RunConfig
from pretrain.data.dataset import ShardDataset
from pretrain.data.stream import SampleStream
from pretrain.distributed import World
from pretrain.engine import Engine, build
from pretrain.errors import CheckpointError, DataError, ParlanceError, Requeue
from pretrain.hooks import Save, Signals, Skips, StopOnSignal, TextSamples, Validation
from pretrain.loop import Hook, Progress, StepReport, fit
from pretrain.models import EncoderDecoder
from pretrain.optim import learning_rate
from pretrain.progress import Console, short
from pretrain.tensorboard import TensorBoard

PREVIEWS = 4
MadeT = TypeVar("MadeT")


def main(
    config_path: str | Path, overrides: Sequence[str] = (), deepspeed_config: str | Path | None = None
) -> Progress:
    """Trains, or continues, the run that `config_path` describes; every rank calls it.

    Args:
        deepspeed_config: a DeepSpeed JSON of the user's own, merged into the derived one.

    Raises:
        ParlanceError: with the exit code of `pretrain.errors`; an error that all ranks share is raised by rank 0 while
            the others exit silently with its code.
    """
    rank = int(os.environ.get("RANK", "0"))
    with ExitStack() as stack:
        with told_once(rank):
            settings = config.load(RunConfig, config_path, overrides)
            user = config.read_json(deepspeed_config) if deepspeed_config else {}
        signals = stack.enter_context(Signals())
        with told_once(rank):
            world = distributed.init()
            stack.callback(distributed.shutdown)
            dataset = together(lambda: ShardDataset(settings.data.path, settings.data.on_bad_shard))
            settings = complete_config(settings, dataset)
            module = build_module(settings, dataset)
            stream = build_stream(settings, dataset, module.objective, world)
            store, repaired = checkpoint.open_store(settings.run_dir)
            stack.callback(store.unlock)
            changed = distributed.rank_zero(lambda: claim(settings, store))
            engine = build(settings.engine, settings.optim, module, world, user)
            progress = resume(store, engine, world, settings.seed, dataset.manifest.index_sha256)
        run = Run(settings, world, engine, stream, dataset, store, progress, stack)
        run.announce(repaired, changed)
        # A broken shard is met by one rank alone, which therefore speaks for itself.
        with told_once(rank, DataError), run.journal():
            rate = partial(learning_rate, config=settings.optim, total_steps=settings.train.steps)
            windows = stream.windows(progress.position, world.rank, world.size)
            with closing(windows):  # type: ignore[type-var]  # a generator, whose end also ends its workers
                return fit(engine, windows, rate, settings.train.steps, progress, run.hooks(signals))


class Run:
    """One life of a run: its folder, what it prints and its periodic work. Only rank 0 has a console and a board."""

    def __init__(
        self,
        settings: RunConfig,
        world: World,
        engine: Engine,
        stream: SampleStream,
        dataset: ShardDataset,
        store: Store,
        progress: Progress,
        stack: ExitStack,
    ) -> None:
        self.settings, self.world, self.engine, self.stream = settings, world, engine, stream
        self.dataset, self.store, self.progress, self.stack = dataset, store, progress, stack
        self.folder = settings.run_dir
        self.reached = progress
        self.console: Console | None = None
        self.board: TensorBoard | None = None
        self.events = runs.Events(self.folder)

    def announce(self, repaired: Sequence[str], changed: dict[str, Any]) -> None:
        """Rank 0 writes config.yaml and env.json, prints what was derived and opens console and board."""
        if self.world.rank:
            return
        text, step = config.dump(self.settings), self.progress.step
        environment = runs.describe_environment(self.world, self._model.backend)
        runs.write_text(self.folder / runs.CONFIG, text)
        runs.write_json(self.folder / runs.ENVIRONMENT, environment)
        for line in [*repaired, *self._derived()]:
            print(line, file=sys.stderr, flush=True)
        self.events.add("resume" if step else "start", step, repaired=repaired, changed=changed, **environment)
        log_every = self.settings.train.log_every
        self.console = Console(step, self.settings.train.steps, log_every)
        self.stack.callback(self.console.close)
        self.board = TensorBoard(self.folder / runs.BOARD, step, log_every)
        self.stack.callback(self.board.close)
        self.board.config(text, self.settings.model_dump(mode="json"))

    def hooks(self, signals: Signals) -> list[Hook]:
        """Periodic work in the order it is done after an update; saving comes last, when all else is on disk."""
        train, note = self.settings.train, self.console.note if self.console else None
        hooks: list[Hook] = [hook for hook in (self.console, self.board) if hook]
        if train.validate_every and self.stream.valid is not None:
            batches = self.stream.fixed_batches(train.validate_batches, self.world.rank, self.world.size)
            hooks.append(Validation(self.engine, batches, train.validate_every, self.board, note))
        if train.sample_every:
            batch, folder = self.stream.preview(PREVIEWS), self.folder / runs.SAMPLES
            decode = partial(readable, self.dataset.tokenizer)
            hooks.append(TextSamples(self.engine, batch, decode, train.sample_every, folder, self.board, PREVIEWS))
        save = Save(train.save_every, self.save)
        return [*hooks, Skips(self._skipped), save, StopOnSignal(signals, save)]

    def save(self, progress: Progress) -> None:
        """Commits a checkpoint and deletes those that `train.keep` no longer covers; collective."""
        content = {**progress.to_json(), "data": self.dataset.manifest.index_sha256}
        checkpoint.save(self.store, progress.step, self.engine, self.world, content, keep=self.settings.train.keep)
        self.reached = progress
        self._record("save", progress.step)

    @contextmanager
    def journal(self) -> Iterator[None]:
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

    @property
    def _model(self) -> EncoderDecoder:
        model = self.engine.module.model
        assert isinstance(model, EncoderDecoder)
        return model

    def _record(self, event: str, step: int, **details: Any) -> None:
        if self.world.rank == 0:
            self.events.add(event, step, **details)

    def _skipped(self, report: StepReport) -> None:
        self._record("skip", report.step, loss_scale=report.loss_scale)

    def _derived(self) -> list[str]:
        """What follows from the configuration, for people to check before they wait."""
        settings, corpus, step = self.settings, self.stream.corpus, self.progress.step
        plan = self.stream.plan_step(self.progress.position, self.world.size)
        micros, parameters = len(plan.micro[0]), sum(math.prod(shape) for shape in self.engine.shapes().values())
        left = settings.train.steps - step
        engine = settings.engine
        how = f"deepspeed ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else "local"
        epochs = self.stream.epoch(plan.count * settings.train.steps)
        valid = sum(self.stream.valid.sizes) if self.stream.valid is not None else 0
        return [
            f"run {self.folder}: {parameters:,} parameters, objective {settings.objective['name']}, {how} "
            f"{engine.precision}, kernels {self._model.backend}, {self.world.size} rank(s) on {self.world.device.type}",
            f"data {settings.data.path}: {sum(corpus.sizes):,} training and {valid:,} validation samples, vocabulary "
            f"{self.dataset.tokenizer.vocab_size:,}",
            f"batch: about {plan.count} samples, {plan.tokens:,} tokens an update, {micros} micro-batch(es) a rank "
            f"of at most {settings.batch.micro_max_tokens:,} tokens",
            f"{f'continuing at step {step}' if step else 'starting'}: {max(left, 0)} of {settings.train.steps} updates "
            f"to do, about {short(plan.tokens * settings.train.steps)} tokens and {epochs:.1f} epochs in all",
            f"watch: tensorboard --logdir {self.folder / runs.BOARD}",
        ]


def claim(settings: RunConfig, store: Store) -> dict[str, Any]:
    """What changed since the run was last started; raises where this configuration may not continue it."""
    before = runs.read_config(settings.run_dir)
    if before is None or not store.commits():
        return {}
    if settings.train.resume == "never":
        raise CheckpointError(
            f"run `{settings.run_dir}` has checkpoints and `train.resume` is never: choose another `name`"
        )
    return runs.check_continues(settings, before)


def resume(store: Store, engine: Engine, world: World, seed: int, data: str) -> Progress:
    """Restores the last verified checkpoint; without one, gives each rank dropout of its own and starts at 0."""
    saved = checkpoint.load_latest(store, engine, world, seed)
    if saved is None:
        rng.seed(seed, 0, world.rank)
        return Progress()
    if saved.get("data") != data:
        raise DataError(
            f"`data.path` must hold the data that run `{store.run_dir}` began with (index {saved.get('data')!s:.12}), "
            f"it holds {data:.12}"
        )
    return Progress.from_json(saved)


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

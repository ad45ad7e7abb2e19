"""`train`: configuration -> data -> model -> engine -> resume -> fit. The same command starts and continues a run."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from pretrain import checkpoint, config, distributed, objectives, rng, runs
from pretrain.commit import Store
from pretrain.config import ModelConfig, RunConfig
from pretrain.data.dataset import ShardDataset, Split
from pretrain.data.plan import BatchSize
from pretrain.data.stream import SampleStream, ShardCorpus
from pretrain.data.tokenizer import TextTokenizer
from pretrain.distributed import World
from pretrain.engine import Engine, build
from pretrain.errors import CheckpointError, ConfigError, DataError, ParlanceError, Requeue
from pretrain.hooks import Save, Signals, Skips, StopOnSignal, TextSamples, Validation
from pretrain.loop import Hook, Progress, StepReport, fit
from pretrain.models import EncoderDecoder, SpecialIds
from pretrain.objectives import ObjectiveModule
from pretrain.optim import learning_rate
from pretrain.progress import Console, short
from pretrain.tensorboard import TensorBoard

PREVIEWS = 4
MadeT = TypeVar("MadeT")


def main(config_path: str | Path, overrides: Sequence[str] = ()) -> Progress:
    """Trains, or continues, the run that `config_path` describes; every rank calls it.

    Raises:
        ParlanceError: with the exit code of `pretrain.errors`; an error that all ranks share is raised by rank 0 while
            the others exit silently with its code.
    """
    rank = int(os.environ.get("RANK", "0"))
    with ExitStack() as stack:
        with told_once(rank):
            settings = config.load(RunConfig, config_path, overrides)
        signals = stack.enter_context(Signals())
        with told_once(rank):
            world = distributed.init()
            stack.callback(distributed.shutdown)
            dataset = together(lambda: ShardDataset(settings.data.path, settings.data.on_bad_shard))
            settings = complete(settings, dataset)
            module = build_module(settings, dataset)
            stream = build_stream(settings, dataset, module.objective, world)
            store, repaired = checkpoint.open_store(settings.run_dir)
            changed = distributed.rank_zero(lambda: claim(settings, store))
            engine = build(settings.engine, settings.optim, module, world)
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
        micros, parameters = len(plan.micro[0]), sum(p.numel() for p in self.engine_parameters())
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

    def engine_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters by their full size, which ZeRO-3 hides in the module itself."""
        return [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in self.engine.shapes().values()]


def complete(settings: RunConfig, dataset: ShardDataset) -> RunConfig:
    """The configuration with the vocabulary size filled in from the tokenizer, checked against the data."""
    model, vocabulary = settings.model, dataset.tokenizer.vocab_size
    if model.vocab_size is not None and model.vocab_size < vocabulary:
        raise ConfigError(
            f"`model.vocab_size` must be at least the {vocabulary} tokens of `{settings.data.path}`, "
            f"got {model.vocab_size}"
        )
    longest = max(ShardCorpus(dataset, split).longest for split in get_args(Split))
    if model.max_positions < longest:
        raise ConfigError(
            f"`model.max_positions` must be at least the {longest} tokens of the longest sample of "
            f"`{settings.data.path}`, got {model.max_positions}"
        )
    filled: ModelConfig = model.model_copy(update={"vocab_size": model.vocab_size or vocabulary})
    return settings.model_copy(update={"model": filled})


def build_module(settings: RunConfig, dataset: ShardDataset) -> ObjectiveModule:
    """Model and objective; the weights follow from the seed alone."""
    tokenizer = dataset.tokenizer
    ids = SpecialIds(tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.mask, tokenizer.unk)
    objective = objectives.build(settings.objective, ids, tokenizer.word_starts, settings.model.length_classes)
    rng.seed(settings.seed)
    try:
        model = EncoderDecoder(settings.model, ids, settings.engine.activation_checkpointing, settings.engine.backend)
    except ValueError as error:
        raise ConfigError(f"`engine.backend`: {error}") from None
    return ObjectiveModule(model, objective)


def build_stream(settings: RunConfig, dataset: ShardDataset, objective: Any, world: World) -> SampleStream:
    """The stream of training samples, after checking that every rank can have one."""
    corpus = ShardCorpus(dataset, "train")
    if sum(corpus.sizes) < world.size:
        raise DataError(
            f"`{settings.data.path}` must have at least one training sample for each of {world.size} ranks, "
            f"it has {sum(corpus.sizes)}"
        )
    weights = settings.data.weights
    if weights is not None and set(weights) != set(corpus.names):
        raise ConfigError(f"`data.weights` must name {', '.join(corpus.names)}, got {', '.join(weights)}")
    return SampleStream(
        corpus,
        objective,
        seed=settings.seed,
        batch=BatchSize(**settings.batch.model_dump()),
        valid=ShardCorpus(dataset, "valid"),
        weights=None if weights is None else [weights[name] for name in corpus.names],
        workers=settings.data.workers,
    )


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


def readable(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    """Text with a box for every MASK."""
    parts = groupby(ids, key=lambda number: number == tokenizer.mask)
    return "".join(" ▢" * len(list(run)) if masked else tokenizer.decode(run) for masked, run in parts)


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

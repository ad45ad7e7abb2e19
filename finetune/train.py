"""`train`: bundle and task -> tuned bundle. The same command starts and continues a run.

A run lives in `runs/<name>` like one of pre-training; `bundle/` in it is the result, and `task/` holds the validation
and test pairs as parallel text files, for `generate` and `score`.
"""

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune import runners, tasks
from finetune.config import TuneConfig
from finetune.corpus import PairCorpus
from finetune.hooks import WrittenTexts
from finetune.runners import Runner, with_modes
from finetune.tasks import Pair, SplitName
from pretrain import checkpoint, config, distributed, objectives, rng, runs
from pretrain.bundle import Bundle, load_bundle, write_bundle
from pretrain.commit import Store
from pretrain.data.plan import BatchSize
from pretrain.data.stream import SampleStream
from pretrain.distributed import World
from pretrain.engine import Engine, build
from pretrain.errors import CheckpointError, ConfigError, DataError, ParlanceError, Requeue
from pretrain.flatten import flatten
from pretrain.hooks import Save, Signals, Skips, StopOnSignal, Validation
from pretrain.loop import Hook, Progress, StepReport, fit
from pretrain.objectives import ObjectiveModule
from pretrain.optim import learning_rate
from pretrain.progress import Console
from pretrain.tensorboard import TensorBoard
from pretrain.train import together, told_once

BUNDLE, TASK = "bundle", "task"
# What decides the order of the data, the model and the objective: the past of a run cannot be of two kinds.
FIXED = ("seed", "bundle", "task", "runner", "max_source", "max_target", "batch.samples", "batch.tokens")
FREE = ("runner.decoding",)


@dataclass(frozen=True)
class Data:
    """The task's pairs and, encoded, what training and validation read. valid is None where no pair is left."""

    pairs: Mapping[SplitName, list[Pair]]
    train: PairCorpus
    valid: PairCorpus | None

    @property
    def fingerprint(self) -> str:
        """sha256 of the training pairs in their order."""
        lines = (f"{pair.source}\t{pair.target}\n" for pair in self.pairs["train"])
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def main(config_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Tunes, or continues, the run that `config_path` describes, and returns the folder of its bundle.

    Raises:
        ParlanceError: with the exit code of `pretrain.errors`; an error that all ranks share is raised by rank 0 while
            the others exit silently with its code.
    """
    rank = int(os.environ.get("RANK", "0"))
    with ExitStack() as stack:
        with told_once(rank):
            settings = config.load(TuneConfig, config_path, overrides)
        signals = stack.enter_context(Signals())
        with told_once(rank):
            world = distributed.init()
            stack.callback(distributed.shutdown)
            bundle = together(lambda: open_bundle(settings))
            runner = runners.build(settings.runner, bundle.description)
            data = together(lambda: read_data(settings, bundle))
            stream, module = assemble(settings, bundle, runner, data)
            store, repaired = checkpoint.open_store(settings.run_dir)
            changed = distributed.rank_zero(lambda: claim(settings, store))
            engine = build(settings.engine, settings.optim, module, world)
            progress = resume(store, engine, world, settings.seed, data.fingerprint)
        run = Run(settings, world, engine, bundle, runner, data, stream, store, progress, stack)
        run.announce(repaired, changed)
        with told_once(rank), run.journal():
            rate = partial(learning_rate, config=settings.optim, total_steps=settings.train.steps)
            windows = stream.windows(progress.position, world.rank, world.size)
            with closing(windows):  # type: ignore[type-var]  # a generator, whose end also ends its workers
                progress = fit(engine, windows, rate, settings.train.steps, progress, run.hooks(signals))
            return run.write_bundle(progress)


class Run:
    """One life of a run: its folder, what it prints and its periodic work. Only rank 0 has a console and a board."""

    def __init__(
        self,
        settings: TuneConfig,
        world: World,
        engine: Engine,
        bundle: Bundle,
        runner: Runner,
        data: Data,
        stream: SampleStream,
        store: Store,
        progress: Progress,
        stack: ExitStack,
    ) -> None:
        self.settings, self.world, self.engine, self.bundle = settings, world, engine, bundle
        self.runner, self.data, self.stream, self.store = runner, data, stream, store
        self.progress, self.stack, self.folder, self.reached = progress, stack, settings.run_dir, progress
        self.console: Console | None = None
        self.board: TensorBoard | None = None
        self.events = runs.Events(self.folder)
        self.environment = runs.describe_environment(world, bundle.model.backend)

    def announce(self, repaired: Sequence[str], changed: dict[str, Any]) -> None:
        """Rank 0 writes the files of the run, prints what was derived and opens console and board."""
        if self.world.rank:
            return
        text, step = config.dump(self.settings), self.progress.step
        runs.write_text(self.folder / runs.CONFIG, text)
        runs.write_json(self.folder / runs.ENVIRONMENT, self.environment)
        for split in ("valid", "test"):
            for side in ("source", "target"):
                lines = [getattr(pair, side) for pair in self.data.pairs[split]]
                runs.write_text(self.folder / TASK / f"{split}.{side}", "".join(f"{line}\n" for line in lines))
        for line in [*repaired, *self._derived()]:
            print(line, file=sys.stderr, flush=True)
        self.events.add("resume" if step else "start", step, repaired=repaired, changed=changed, **self.environment)
        train = self.settings.train
        self.console = Console(step, train.steps, train.log_every)
        self.stack.callback(self.console.close)
        self.board = TensorBoard(self.folder / runs.BOARD, step, train.log_every)
        self.stack.callback(self.board.close)
        self.board.config(text, self.settings.model_dump(mode="json"))

    def hooks(self, signals: Signals) -> list[Hook]:
        """Periodic work in the order it is done after an update; saving comes last, when all else is on disk."""
        train, note = self.settings.train, self.console.note if self.console else None
        hooks: list[Hook] = [hook for hook in (self.console, self.board) if hook]
        if train.validate_every and self.stream.valid is not None:
            batches = self.stream.fixed_batches(train.validate_batches, self.world.rank, self.world.size)
            hooks.append(Validation(self.engine, batches, train.validate_every, self.board, note))
        shown = (self.data.pairs["valid"] or self.data.pairs["train"])[: self.settings.shown]
        if train.sample_every:
            tokenizer, folder = self.bundle.tokenizer, self.folder / runs.SAMPLES
            texts = (self.engine, self.runner, tokenizer, shown, train.sample_every, folder, self.board, note)
            hooks.append(WrittenTexts(*texts))
        save = Save(train.save_every, self.save)
        return [*hooks, Skips(self._skipped), save, StopOnSignal(signals, save)]

    def save(self, progress: Progress) -> None:
        """Commits a checkpoint and deletes those that `train.keep` no longer covers; collective."""
        content = {**progress.to_json(), "data": self.data.fingerprint}
        checkpoint.save(self.store, progress.step, self.engine, self.world, content, keep=self.settings.train.keep)
        self.reached = progress
        self._record("save", progress.step)

    def write_bundle(self, progress: Progress) -> Path:
        """RUN/bundle: the tuned weights, with the modes that the runner has trained; collective."""
        out = self.folder / BUNDLE
        weights = {name.removeprefix("model."): value for name, value in self.engine.full_weights().items()}
        description = with_modes(self.bundle.description, self.runner)
        provenance = {
            "run": self.settings.name,
            **progress.to_json(),
            "config": self.settings.model_dump(mode="json"),
            "environment": self.environment,
            "pairs": {split: len(pairs) for split, pairs in self.data.pairs.items()},
            "tuned_from": self.bundle.provenance,
        }
        distributed.rank_zero(lambda: str(write_bundle(out, weights, description, self.bundle.tokenizer, provenance)))
        if self.world.rank == 0:
            print(f"bundle {out}: modes {', '.join(description.modes)}", file=sys.stderr, flush=True)
        return out

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

    def _record(self, event: str, step: int, **details: Any) -> None:
        if self.world.rank == 0:
            self.events.add(event, step, **details)

    def _skipped(self, report: StepReport) -> None:
        self._record("skip", report.step, loss_scale=report.loss_scale)

    def _derived(self) -> list[str]:
        """What follows from the configuration, for people to check before they wait."""
        settings, train, pairs, step = self.settings, self.data.train, self.data.pairs, self.progress.step
        plan = self.stream.plan_step(self.progress.position, self.world.size)
        parameters = sum(math.prod(shape) for shape in self.engine.shapes().values())
        epochs = self.stream.epoch(plan.count * settings.train.steps)
        return [
            f"run {self.folder}: {parameters:,} parameters from {settings.bundle}, runner {settings.runner['name']}, "
            f"{settings.engine.kind} {settings.engine.precision}, {self.world.size} rank(s) on "
            f"{self.world.device.type}",
            f"task {settings.task['name']}: {len(pairs['train']):,} training, {len(pairs['valid']):,} validation and "
            f"{len(pairs['test']):,} test pairs; {train.cut} sources cut to {settings.max_source} tokens, "
            f"{train.left_out} targets longer than {settings.max_target} left out",
            f"batch: about {plan.count} pairs an update, {len(plan.micro[0])} micro-batch(es) a rank; "
            f"{f'continuing at step {step}' if step else 'starting'}: "
            f"{max(settings.train.steps - step, 0)} of {settings.train.steps} updates to do, "
            f"{epochs:.1f} epochs in all",
            f"watch: tensorboard --logdir {self.folder / runs.BOARD}",
        ]


def open_bundle(settings: TuneConfig) -> Bundle:
    """The bundle to start from, with its golden logits checked."""
    try:
        bundle = load_bundle(settings.bundle, backend=settings.engine.backend)
    except ValueError as error:
        raise ConfigError(f"`engine.backend`: {error}") from None
    bundle.model.checkpointing = settings.engine.activation_checkpointing
    return bundle


def read_data(settings: TuneConfig, bundle: Bundle) -> Data:
    """The pairs of the task, and those of training and validation encoded; lengths are checked against the model."""
    limit = bundle.description.model.max_positions
    for name in ("max_source", "max_target"):
        if getattr(settings, name) > limit:
            raise ConfigError(f"`{name}` must be at most the bundle's {limit} positions, got {getattr(settings, name)}")
    task = tasks.build(settings.task)
    pairs = {split: task.pairs(split) for split in tasks.SPLITS}
    encode = partial(
        PairCorpus,
        tokenizer=bundle.tokenizer,
        ids=bundle.description.ids,
        max_source=settings.max_source,
        max_target=settings.max_target,
    )
    return Data(pairs, encode(pairs["train"]), encode(pairs["valid"]) if pairs["valid"] else None)


def assemble(settings: TuneConfig, bundle: Bundle, runner: Runner, data: Data) -> tuple[SampleStream, ObjectiveModule]:
    """The stream of training samples and the module to train."""
    description = bundle.description
    classes = description.model.length_classes
    objective = objectives.build(runner.objective, description.ids, bundle.tokenizer.word_starts, classes)
    batch = BatchSize(**settings.batch.model_dump())
    stream = SampleStream(
        data.train, objective, seed=settings.seed, batch=batch, valid=data.valid, workers=settings.workers
    )
    return stream, ObjectiveModule(bundle.model, objective)


def claim(settings: TuneConfig, store: Store) -> dict[str, Any]:
    """What changed since the run was last started; raises where this configuration may not continue it."""
    path = settings.run_dir / runs.CONFIG
    if not path.exists() or not store.commits():
        return {}
    if settings.train.resume == "never":
        raise CheckpointError(
            f"run `{settings.run_dir}` has checkpoints and `train.resume` is never: choose another `name`"
        )
    before, now = config.load(TuneConfig, path), settings
    old, new = flatten(before.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    changed = {
        key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }
    for key, (was, given) in changed.items():
        if _within(key, FIXED) and not _within(key, FREE):
            raise ConfigError(
                f"`{key}` must stay {was!r} in run `{settings.run_dir}`, got {given!r}: continue with the old value or "
                "choose another `name`"
            )
    return changed


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def resume(store: Store, engine: Engine, world: World, seed: int, data: str) -> Progress:
    """Restores the last verified checkpoint; without one, gives each rank dropout of its own and starts at 0."""
    saved = checkpoint.load_latest(store, engine, world, seed)
    if saved is None:
        rng.seed(seed, 0, world.rank)
        return Progress()
    if saved.get("data") != data:
        raise DataError(
            f"`task` must give the training pairs that run `{store.run_dir}` began with ({saved.get('data')!s:.12}), "
            f"it gives {data:.12}"
        )
    return Progress.from_json(saved)

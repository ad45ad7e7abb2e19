"""`train`: bundle and task -> tuned bundle. The same command starts and continues a run.

A run lives in `runs/<name>` like one of pre-training; `bundle/` in it is the result, and `task/` holds the validation
and test pairs as parallel text files, for `generate` and `score`.
"""

import hashlib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune import runners, tasks
from finetune.config import TuneConfig
from finetune.corpus import PairCorpus
from finetune.hooks import WrittenTexts
from finetune.runners import Runner, with_modes
from finetune.tasks import Pair, SplitName
from pretrain import checkpoint, config, distributed, objectives, runs
from pretrain.bundle import Bundle, load_bundle, write_bundle
from pretrain.data.plan import BatchSize
from pretrain.data.stream import SampleStream
from pretrain.engine import build
from pretrain.errors import ConfigError
from pretrain.hooks import Signals
from pretrain.loop import Hook, Progress
from pretrain.objectives import ObjectiveModule
from pretrain.run import Run, claim, together, told_once

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
            stack.callback(store.unlock)
            changed = distributed.rank_zero(lambda: claim(settings, store, FIXED, FREE))
            engine = build(settings.engine, settings.optim, module, world)
            run = Run(settings, world, engine, stream, store, data.fingerprint, "task", stack)
        write_task(run, data)
        run.announce(repaired, changed, derived(run, settings, data))
        with told_once(rank):
            progress = run.train(signals, written_texts(run, settings, bundle, runner, data))
            return hand_over(run, settings, bundle, runner, data, progress)


def write_task(run: Run, data: Data) -> None:
    """RUN/task: validation and test pairs as parallel text files."""
    if run.world.rank:
        return
    for split in ("valid", "test"):
        for side in ("source", "target"):
            lines = [getattr(pair, side) for pair in data.pairs[split]]
            runs.write_text(run.folder / TASK / f"{split}.{side}", "".join(f"{line}\n" for line in lines))


def written_texts(run: Run, settings: TuneConfig, bundle: Bundle, runner: Runner, data: Data) -> Hook | None:
    """Whole texts of a few validation pairs with their scores; None where they are not wanted."""
    every = settings.train.sample_every
    if not every:
        return None
    shown = (data.pairs["valid"] or data.pairs["train"])[: settings.shown]
    folder = run.folder / runs.SAMPLES
    return WrittenTexts(run.engine, runner, bundle.tokenizer, shown, every, folder, run.board, run.note)


def hand_over(run: Run, settings: TuneConfig, bundle: Bundle, runner: Runner, data: Data, progress: Progress) -> Path:
    """RUN/bundle: the tuned weights, with the modes that the runner has trained; collective."""
    out = run.folder / BUNDLE
    weights = {name.removeprefix("model."): value for name, value in run.engine.full_weights().items()}
    description = with_modes(bundle.description, runner)
    provenance = {
        "run": settings.name,
        **progress.to_json(),
        "config": settings.model_dump(mode="json"),
        "environment": run.environment,
        "pairs": {split: len(pairs) for split, pairs in data.pairs.items()},
        "tuned_from": bundle.provenance,
    }
    distributed.rank_zero(lambda: str(write_bundle(out, weights, description, bundle.tokenizer, provenance)))
    if run.world.rank == 0:
        print(f"bundle {out}: modes {', '.join(description.modes)}", file=sys.stderr, flush=True)
    return out


def derived(run: Run, settings: TuneConfig, data: Data) -> list[str]:
    """What follows from the configuration, for people to check before they wait."""
    train, pairs, step, steps = data.train, data.pairs, run.progress.step, settings.train.steps
    plan = run.stream.plan_step(run.progress.position, run.world.size)
    parameters = sum(math.prod(shape) for shape in run.engine.shapes().values())
    epochs = run.stream.epoch(plan.count * steps)
    return [
        f"run {run.folder}: {parameters:,} parameters from {settings.bundle}, runner {settings.runner['name']}, "
        f"{settings.engine.kind} {settings.engine.precision}, {run.world.size} rank(s) on {run.world.device.type}",
        f"task {settings.task['name']}: {len(pairs['train']):,} training, {len(pairs['valid']):,} validation and "
        f"{len(pairs['test']):,} test pairs; {train.cut} sources cut to {settings.max_source} tokens, "
        f"{train.left_out} targets longer than {settings.max_target} left out",
        f"batch: about {plan.count} pairs an update, {len(plan.micro[0])} micro-batch(es) a rank; "
        f"{f'continuing at step {step}' if step else 'starting'}: "
        f"{max(steps - step, 0)} of {steps} updates to do, {epochs:.1f} epochs in all",
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

"""`train`: bundle and task -> tuned bundle. The same command starts and continues a run.

A run lives in `runs/<name>` like one of pre-training; `bundle/` in it is the result, and `task/` holds the validation
and test pairs as parallel text files, for `generate` and `score`.
"""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from finetune import runners, selection, tasks
from finetune.config import TuneConfig, with_presets
from finetune.corpus import PairCorpus
from finetune.hooks import WrittenTexts, written_tag
from finetune.runners import Runner, with_modes
from finetune.tasks import Pair, SplitName
from pretrain import config, distributed, objectives, rng, runs
from pretrain.assemble import with_steps
from pretrain.bundles.bundle import Bundle, content_sha256, load_bundle, write_bundle
from pretrain.checkpoints import checkpoint
from pretrain.claim import claim
from pretrain.data.plan import BatchSize
from pretrain.data.stream import SampleStream
from pretrain.distributed import check_same, together
from pretrain.engine import build
from pretrain.errors import ConfigError, DataError
from pretrain.flatten import flatten
from pretrain.loop import Hook, Progress
from pretrain.objectives import ObjectiveModule
from pretrain.run import Run
from pretrain.watchdog import Watchdog

BUNDLE, TASK = "bundle", "task"
# What decides the order of the data, the model and the objective: the past of a run cannot be of two kinds.
FIXED = ("seed", "bundle", "task", "runner", "max_source", "max_target", "batch.samples", "batch.tokens")
FREE = ("runner.decoding",)


@dataclass(frozen=True)
class Data:
    """The task's pairs and, encoded, what training and validation read. valid is None where no pair is left.

    metrics: that the task is judged by. bundle_sha256: of the bundle whose tokenizer has encoded the pairs.
    """

    pairs: Mapping[SplitName, list[Pair]]
    train: PairCorpus
    valid: PairCorpus | None
    metrics: Sequence[str]
    bundle_sha256: str

    @property
    def fingerprint(self) -> dict[str, str]:
        """sha256 of the training pairs in their order, and of the bundle."""
        lines = (f"{pair.source}\t{pair.target}\n" for pair in self.pairs["train"])
        pairs_sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
        return {"bundle_sha256": self.bundle_sha256, "pairs_sha256": pairs_sha256}


def main(config_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Tunes, or continues, the run that `config_path` describes, and returns the folder of its bundle.

    Raises:
        ParlanceError: with the exit code of `pretrain.errors`; what one rank meets, every rank raises.
    """
    with ExitStack() as stack:
        world = distributed.init()
        stack.callback(distributed.shutdown)
        given = together(lambda: complete_options(config.load(TuneConfig, config_path, with_presets(overrides))))
        lost, limit = partial(runs.record_lost, given.run_dir), given.train.hang_seconds
        stack.enter_context(Watchdog(world, limit, lost, given.run_dir))
        check_same("the configuration", flatten(given.model_dump(mode="json")), ConfigError)
        bundle = together(lambda: open_bundle(given))
        runner = together(lambda: build_runner(given, bundle))
        data = together(lambda: read_data(given, bundle))
        check_same("`bundle` and the pairs of `task`", data.fingerprint, DataError)
        ways = runners.ways(given.runner["name"], runner)
        together(lambda: selection.check(given.train, data.metrics, ways, data.valid is not None))
        stream, module = together(lambda: assemble(given, bundle, runner, data))
        train = together(lambda: with_steps(given.train, stream.order, stream.corpus, stream.batch))
        settings = given.model_copy(update={"train": train})
        store, repaired = checkpoint.open_store(settings.run_dir)
        stack.callback(store.unlock)
        changed = distributed.rank_zero(lambda: claim(settings, store, complete_options, FIXED, FREE))
        engine = build(settings.engine, settings.optim, module, world)
        kept = runs.fixed_values(settings, FIXED, FREE)
        run = Run(settings, world, engine, stream, store, data.fingerprint, "bundle, task", kept, stack)
        distributed.rank_zero(lambda: write_task(run.folder / TASK, data))
        if selects(settings):
            run.spare = partial(selection.spare, train=settings.train, modes=tuple(ways))
        written = [written_tag(mode, metric) for mode in ways for metric in data.metrics]
        metrics = written if settings.train.sample_every else []
        run.announce(repaired, changed, derived(run, settings, data), metrics=metrics)
        progress = run.train(written_texts(run, settings, bundle, ways, data))
        return hand_over(run, settings, bundle, runner, data, progress)


def complete_options(settings: TuneConfig) -> TuneConfig:
    """`settings` with every option of task and runner; raises ConfigError for one that is unknown or out of range."""
    task = config.complete(tasks.REGISTRY, settings.task, "task")
    runner = config.complete(runners.REGISTRY, settings.runner, "runner")
    return settings.model_copy(update={"task": task, "runner": runner})


def write_task(folder: Path, data: Data) -> None:
    """Validation and test pairs as parallel text files in `folder`."""
    for split in ("valid", "test"):
        for side in ("source", "target"):
            lines = [getattr(pair, side) for pair in data.pairs[split]]
            runs.write_text(folder / f"{split}.{side}", "".join(f"{line}\n" for line in lines))


def written_texts(
    run: Run, settings: TuneConfig, bundle: Bundle, ways: Mapping[str, Runner], data: Data
) -> Hook | None:
    """Whole texts of validation pairs with their scores; None where they are not wanted."""
    if not settings.train.sample_every:
        return None
    scored = max(settings.shown, settings.scored or 0)
    return WrittenTexts(
        run.engine,
        ways,
        bundle.tokenizer,
        pairs=(data.pairs["valid"] or data.pairs["train"])[:scored],
        shown=settings.shown,
        metrics=data.metrics,
        max_source=settings.max_source,
        every=settings.train.sample_every,
        folder=run.folder / runs.SAMPLES,
        board=run.board,
        note=run.note,
        scores=run.scores,
    )


def selects(settings: TuneConfig) -> bool:
    """Whether the bundle is anything but the end of training."""
    return settings.train.select is not None or settings.train.average > 1


def hand_over(run: Run, settings: TuneConfig, bundle: Bundle, runner: Runner, data: Data, progress: Progress) -> Path:
    """RUN/bundle: the tuned weights, or those of the chosen checkpoints, with the modes of the runner; collective."""
    out, modes = run.folder / BUNDLE, tuple(runners.ways(settings.runner["name"], runner))
    whole = {} if selects(settings) else run.engine.full_weights()
    weights = {name.removeprefix("model."): value for name, value in whole.items()}
    description = replace(
        with_modes(bundle.description, runner),
        max_source=settings.max_source,
        length_trained=run.engine.module.objective.weights["length"] > 0,
    )

    def write() -> None:
        if selects(settings):
            chosen = selection.chosen_weights(run.store, settings.train, modes)
        else:
            chosen = selection.end_of_training(run.store, weights, progress)
        provenance = {
            "run": settings.name,
            **chosen.progress.to_json(),
            **chosen.provenance,
            "config": settings.model_dump(mode="json"),
            "environment": run.environment,
            "pairs": {split: len(pairs) for split, pairs in data.pairs.items()},
            "tuned_from": bundle.provenance,
        }
        write_bundle(out, chosen.weights, description, bundle.tokenizer, provenance)

    distributed.rank_zero(write)
    if run.world.rank == 0:
        print(f"bundle {out}: modes {', '.join(description.modes)}", file=sys.stderr, flush=True)
    return out


def derived(run: Run, settings: TuneConfig, data: Data) -> list[str]:
    """What follows from the configuration, for people to check before they wait."""
    train, valid, pairs, step, steps = data.train, data.valid, data.pairs, run.progress.step, settings.train.steps
    limits = settings.max_source, settings.max_target
    plan = run.stream.plan_step(run.progress.position, run.world.size)
    parameters = sum(math.prod(shape) for shape in run.engine.shapes().values())
    epochs = run.stream.epoch(plan.count * steps)
    return [
        f"run {run.folder}: {parameters:,} parameters from {settings.bundle}, runner {settings.runner['name']}, "
        f"{settings.engine.kind} {settings.engine.precision}, {run.world.size} rank(s) on {run.world.device.type}",
        f"task {settings.task['name']}: {len(pairs['train']):,} training, {len(pairs['valid']):,} validation and "
        f"{len(pairs['test']):,} test pairs; {train.befell(*limits)}",
        *([f"validation: {valid.befell(*limits)}"] if valid and (valid.cut or valid.left_out or valid.empty) else []),
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


def build_runner(settings: TuneConfig, bundle: Bundle) -> Runner:
    """The runner for the bundle; raises ConfigError where its number of rows does not hold the longest target."""
    runner = runners.build(settings.runner, bundle.description)
    rows, needed = runner.objective.get("rows"), settings.max_target - 1
    if isinstance(rows, int) and rows < needed:
        raise ConfigError(
            f"`runner.rows` must be at least {needed}, the `max_target` of {settings.max_target} without BOS, "
            f"got {rows}: longer targets would tell their length, and never be written"
        )
    return runner


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
    valid = encode(pairs["valid"], name="validation pairs") if pairs["valid"] else None
    return Data(
        pairs, encode(pairs["train"], name="training pairs"), valid, task.metrics, content_sha256(settings.bundle)
    )


def assemble(settings: TuneConfig, bundle: Bundle, runner: Runner, data: Data) -> tuple[SampleStream, ObjectiveModule]:
    """The stream of training samples and the module to train."""
    description = bundle.description
    starts = bundle.tokenizer.word_starts
    objective = objectives.build(runner.objective, description.ids, starts, runner.model)
    batch = BatchSize(**settings.batch.model_dump())
    stream = SampleStream(
        data.train, objective, seed=settings.seed, batch=batch, valid=data.valid, workers=settings.workers
    )
    rng.seed(settings.seed)  # for parameters that the bundle lacks
    model = bundle.model if runner.model == description.model else bundle.model.grown(runner.model)
    return stream, ObjectiveModule(model, objective)

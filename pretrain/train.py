"""`train`: configuration -> data -> model -> engine -> resume -> fit. The same command starts and continues a run."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from pretrain import config, distributed, objectives, runs
from pretrain.assemble import build_module, build_stream, complete_config, readable
from pretrain.checkpoints import checkpoint
from pretrain.claim import claim
from pretrain.config import RunConfig
from pretrain.data.dataset import ShardDataset
from pretrain.data.stream import FIXED_SEED, sample_rng
from pretrain.distributed import check_same, together
from pretrain.engine import build
from pretrain.errors import ConfigError, DataError
from pretrain.flatten import flatten
from pretrain.hooks import TextSamples
from pretrain.loop import Hook, Progress
from pretrain.parsing import read_json
from pretrain.run import PREVIEWS, Run
from pretrain.watch.console import short
from pretrain.watch.pictures import mask_pictures
from pretrain.watchdog import Watchdog

# Tokens of the sample whose masks are drawn.
PICTURED = 10
# What decides the order of the data, the model and the objective: the past of a run cannot be of two kinds.
FIXED = (
    "seed", "init_from", "data.weights", "data.on_bad_shard", "model", "objective", "batch.samples", "batch.tokens"
)  # fmt: skip


def main(
    config_path: str | Path, overrides: Sequence[str] = (), deepspeed_config: str | Path | None = None
) -> Progress:
    """Trains, or continues, the run that `config_path` describes; every rank calls it.

    Args:
        deepspeed_config: a DeepSpeed JSON of the user's own, merged into the derived one.

    Raises:
        ParlanceError: with the exit code of `pretrain.errors`; what one rank meets, every rank raises.
    """
    with ExitStack() as stack:
        world = distributed.init()
        stack.callback(distributed.shutdown)
        given = together(lambda: complete_options(config.load(RunConfig, config_path, overrides)))
        user = together(lambda: read_json(deepspeed_config) if deepspeed_config else {})
        lost, limit = partial(runs.record_lost, given.run_dir), given.train.hang_seconds
        stack.enter_context(Watchdog(world, limit, lost, given.run_dir))
        check_same("the configuration", flatten({**given.model_dump(mode="json"), "deepspeed": user}), ConfigError)
        world = together(lambda: world.divided(given.engine.tensor_parallel))
        dataset = together(lambda: ShardDataset(given.data.path, given.data.on_bad_shard))
        data = {**runs.fingerprint(dataset.manifest), "skipped": dataset.skipped_shards}
        check_same(f"the data in `{given.data.path}`", data, DataError)
        settings = together(lambda: complete_config(given, dataset))
        module = together(lambda: build_module(settings, dataset))
        stream = together(lambda: build_stream(settings, dataset, module.objective, world))
        store, repaired = checkpoint.open_store(settings.run_dir)
        stack.callback(store.unlock)
        changed = distributed.rank_zero(lambda: claim(settings, store, complete_options, FIXED))
        engine = build(settings.engine, settings.optim, module, world, user)
        kept = runs.fixed_values(settings, FIXED)
        run = Run(settings, world, engine, stream, store, data, "data.path", kept, stack)
        run.announce(repaired, changed, derived(run, settings, dataset), lambda: masks(run, dataset))
        return run.train(together(lambda: text_samples(run, dataset)))


def complete_options(settings: RunConfig) -> RunConfig:
    """`settings` with every option of the objective; raises ConfigError for one that is unknown or out of range."""
    options = config.complete(objectives.REGISTRY, settings.objective, "objective")
    return settings.model_copy(update={"objective": options})


def text_samples(run: Run, dataset: ShardDataset) -> Hook | None:
    """One-step predictions on fixed validation samples; None where they are not wanted."""
    every = run.settings.train.sample_every
    if not every:
        return None
    batch, decode = run.stream.preview(PREVIEWS), partial(readable, dataset.tokenizer)
    return TextSamples(run.engine, batch, decode, every, run.folder / runs.SAMPLES, run.board, PREVIEWS)


def masks(run: Run, dataset: ShardDataset) -> dict[str, np.ndarray]:
    """Pictures of who reads whom in a sample from the middle of the data, cut short."""
    objective, tokenizer = run.engine.module.objective, dataset.tokenizer
    middle = len(dataset.lengths) // 2
    tokens_N, sentences = dataset.tokens(middle)[:PICTURED], dataset.sentences(middle)
    example = objective.corrupt(tokens_N, sentences[sentences < PICTURED], sample_rng(FIXED_SEED, 0))
    drawn = mask_pictures(objective.collate([example]), tokenizer.ids, partial(readable, tokenizer))
    return {f"masks/{name}": image_HWC for name, image_HWC in drawn.items()}


def derived(run: Run, settings: RunConfig, dataset: ShardDataset) -> list[str]:
    """What follows from the configuration, for people to check before they wait."""
    stream, step, steps, engine = run.stream, run.progress.step, settings.train.steps, settings.engine
    plan = stream.plan_step(run.progress.position, run.world.data_size)
    micros, parameters = len(plan.micro[0]), sum(math.prod(shape) for shape in run.engine.shapes().values())
    how = f"deepspeed ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else "local"
    how += f", tensor parallel {engine.tensor_parallel}," if engine.tensor_parallel > 1 else ""
    epochs = stream.epoch(plan.count * steps)
    began = f", begun with those of {settings.init_from}" if settings.init_from else ""
    valid = sum(stream.valid.sizes) if stream.valid is not None else 0
    return [
        f"run {run.folder}: {parameters:,} parameters{began}, objective {settings.objective['name']}, {how} "
        f"{engine.precision}, kernels {run.model.backend}, {run.world.size} rank(s) on {run.world.device.type}",
        f"data {settings.data.path}: {sum(stream.corpus.sizes):,} training and {valid:,} validation samples, "
        f"vocabulary {dataset.tokenizer.vocab_size:,}",
        f"batch: about {plan.count} samples, {plan.tokens:,} tokens an update, {micros} micro-batch(es) a rank "
        f"of at most {settings.batch.micro_max_tokens:,} tokens",
        f"{f'continuing at step {step}' if step else 'starting'}: {max(steps - step, 0)} of {steps} updates "
        f"to do, about {short(plan.tokens * steps)} tokens and {epochs:.1f} epochs in all",
    ]

"""`train`: configuration -> data -> model -> engine -> resume -> fit. The same command starts and continues a run."""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pretrain import checkpoint, config, distributed, runs
from pretrain.assemble import build_module, build_stream, complete_config, readable
from pretrain.config import RunConfig
from pretrain.data.dataset import ShardDataset
from pretrain.engine import build
from pretrain.errors import DataError
from pretrain.hooks import Signals, TextSamples
from pretrain.loop import Hook, Progress
from pretrain.progress import short
from pretrain.run import Run, claim, together, told_once

PREVIEWS = 4
# What decides the order of the data, the model and the objective: the past of a run cannot be of two kinds.
FIXED = ("seed", "data.weights", "data.on_bad_shard", "model", "objective", "batch.samples", "batch.tokens")


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
            changed = distributed.rank_zero(lambda: claim(settings, store, FIXED))
            engine = build(settings.engine, settings.optim, module, world, user)
            run = Run(settings, world, engine, stream, store, dataset.manifest.index_sha256, "data.path", stack)
        run.announce(repaired, changed, derived(run, settings, dataset))
        # A broken shard is met by one rank alone, which therefore speaks for itself.
        with told_once(rank, DataError):
            return run.train(signals, text_samples(run, dataset))


def text_samples(run: Run, dataset: ShardDataset) -> Hook | None:
    """One-step predictions on fixed validation samples; None where they are not wanted."""
    every = run.settings.train.sample_every
    if not every:
        return None
    batch, decode = run.stream.preview(PREVIEWS), partial(readable, dataset.tokenizer)
    return TextSamples(run.engine, batch, decode, every, run.folder / runs.SAMPLES, run.board, PREVIEWS)


def derived(run: Run, settings: RunConfig, dataset: ShardDataset) -> list[str]:
    """What follows from the configuration, for people to check before they wait."""
    stream, step, steps, engine = run.stream, run.progress.step, settings.train.steps, settings.engine
    plan = stream.plan_step(run.progress.position, run.world.size)
    micros, parameters = len(plan.micro[0]), sum(math.prod(shape) for shape in run.engine.shapes().values())
    how = f"deepspeed ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else "local"
    epochs = stream.epoch(plan.count * steps)
    valid = sum(stream.valid.sizes) if stream.valid is not None else 0
    return [
        f"run {run.folder}: {parameters:,} parameters, objective {settings.objective['name']}, {how} "
        f"{engine.precision}, kernels {run.model.backend}, {run.world.size} rank(s) on {run.world.device.type}",
        f"data {settings.data.path}: {sum(stream.corpus.sizes):,} training and {valid:,} validation samples, "
        f"vocabulary {dataset.tokenizer.vocab_size:,}",
        f"batch: about {plan.count} samples, {plan.tokens:,} tokens an update, {micros} micro-batch(es) a rank "
        f"of at most {settings.batch.micro_max_tokens:,} tokens",
        f"{f'continuing at step {step}' if step else 'starting'}: {max(steps - step, 0)} of {steps} updates "
        f"to do, about {short(plan.tokens * steps)} tokens and {epochs:.1f} epochs in all",
    ]

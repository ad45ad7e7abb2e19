"""From a configuration and its data to the parts of a training run: model, objective, stream."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, get_args

from pretrain import objectives, rng, runs
from pretrain.bundles.bundle import load_bundle, read_description
from pretrain.checkpoints.commit import Store
from pretrain.config import ModelConfig, RunConfig, TrainConfig
from pretrain.data.dataset import ShardDataset, Split
from pretrain.data.order import BlendedOrder, weights_by_name
from pretrain.data.plan import BatchSize, Corpus, plan_step
from pretrain.data.stream import SampleStream, ShardCorpus
from pretrain.data.tokenizer import TextTokenizer
from pretrain.distributed import World
from pretrain.errors import ConfigError, DataError
from pretrain.models import EncoderDecoder
from pretrain.objectives import ObjectiveModule

# What a run may choose anew in the model it inherits.
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
# Updates that are looked at to tell how many samples a batch in tokens holds.
PROBED = 16


def complete_config(settings: RunConfig, dataset: ShardDataset) -> RunConfig:
    """The configuration with what bundle and data decide: the model, its vocabulary size, the number of updates.

    Raises:
        ConfigError: the model contradicts `init_from`, or is too small for the data.
        DataError: the data was made with another tokenizer than that of `init_from`.
        CheckpointError: `init_from` is no bundle.
    """
    model = settings.model if settings.init_from is None else _inherited(settings, settings.init_from, dataset)
    vocabulary = dataset.tokenizer.vocab_size
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
    train = settings.train
    if train.epochs is not None:
        corpus = ShardCorpus(dataset, "train")
        order = BlendedOrder(corpus.sizes, _weights(settings, corpus), settings.seed)
        train = with_steps(train, order, corpus, BatchSize(**settings.batch.model_dump()))
    return settings.model_copy(update={"model": filled, "train": train})


def with_steps(train: TrainConfig, order: BlendedOrder, corpus: Corpus, batch: BatchSize) -> TrainConfig:
    """`train` with `epochs`, if given, put as `steps`: the updates after which at least so many have passed.

    Exact for a batch in samples; for one in tokens from the mean of some updates all over the first epoch.
    """
    if train.epochs is None:
        return train
    batch.check(corpus.longest)
    starts = range(0, order.samples, -(-order.samples // PROBED))
    mean = sum(plan_step(order, corpus, start, 1, batch).count for start in starts) / len(starts)
    steps = math.ceil(train.epochs * order.samples / mean)
    return train.model_copy(update={"steps": steps, "epochs": None})


def build_module(settings: RunConfig, dataset: ShardDataset) -> ObjectiveModule:
    """Model and objective; the weights are those of `init_from`, or follow from the seed alone.

    A run that has a checkpoint does not read the bundle any more.
    """
    tokenizer = dataset.tokenizer
    ids = tokenizer.ids
    objective = objectives.build(settings.objective, ids, tokenizer.word_starts, settings.model)
    bundle = load_bundle(str(settings.init_from), backend=settings.engine.backend) if inherits(settings) else None
    rng.seed(settings.seed)
    try:
        model = EncoderDecoder(settings.model, ids, settings.engine.activation_checkpointing, settings.engine.backend)
    except ValueError as error:
        raise ConfigError(f"`engine.backend`: {error}") from None
    if bundle is not None:
        inherited, chosen = bundle.description.layout.layout, objective.layout.layout
        if inherited != chosen and not set(objective.modes).isdisjoint(("ar", "causal")):
            raise ConfigError(f"`objective.ar_layout` must be {inherited}, as in `{settings.init_from}`, got {chosen}")
        model.load_state_dict(bundle.model.state_dict())
    return ObjectiveModule(model, objective)


def build_stream(settings: RunConfig, dataset: ShardDataset, objective: Any, world: World) -> SampleStream:
    """The stream of training samples, after checking that every rank can have one."""
    corpus = ShardCorpus(dataset, "train")
    if sum(corpus.sizes) < world.data_size:
        raise DataError(
            f"`{settings.data.path}` must have at least one training sample for each of {world.data_size} ranks, "
            f"it has {sum(corpus.sizes)}"
        )
    return SampleStream(
        corpus,
        objective,
        seed=settings.seed,
        batch=BatchSize(**settings.batch.model_dump()),
        valid=ShardCorpus(dataset, "valid"),
        weights=_weights(settings, corpus),
        workers=settings.data.workers,
    )


def readable(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    """Text with a box for every MASK."""
    parts = groupby(ids, key=lambda number: number == tokenizer.mask)
    return "".join(" ▢" * len(list(run)) if masked else tokenizer.decode(run) for masked, run in parts)


def _inherited(settings: RunConfig, init_from: str, dataset: ShardDataset) -> ModelConfig:
    """The model of the bundle, or of the run itself once it has a checkpoint, with the dropouts that are given."""
    before = runs.read_config(settings.run_dir, RunConfig) if _has_checkpoint(settings) else None
    if before is not None:
        shape = before.model
    else:
        description, tokenizer = read_description(init_from)
        if tokenizer.sha256 != dataset.tokenizer.sha256:
            raise DataError(
                f"`{settings.data.path}` must be made with the tokenizer of `{init_from}` ({tokenizer.sha256:.12}), "
                f"its own is {dataset.tokenizer.sha256:.12}: prepare it with `--tokenizer {init_from}`"
            )
        shape = description.model
    given = {name: getattr(settings.model, name) for name in sorted(settings.model.model_fields_set)}
    conflicts = [
        f"`model.{name}` must be {inherited!r} or absent, as in `{init_from}`, got {value!r}"
        for name, value in given.items()
        if name not in DROPOUTS and value not in (inherited := getattr(shape, name), None)
    ]
    if conflicts:
        raise ConfigError("; ".join(conflicts))
    return shape.model_copy(update={name: value for name, value in given.items() if name in DROPOUTS})


def inherits(settings: RunConfig) -> bool:
    """Whether a bundle will give this run its weights."""
    return settings.init_from is not None and not _has_checkpoint(settings)


def _has_checkpoint(settings: RunConfig) -> bool:
    """Whether a checkpoint will give this run its weights."""
    return bool(Store(settings.run_dir).commits())


def _weights(settings: RunConfig, corpus: ShardCorpus) -> list[float] | None:
    weights = settings.data.weights
    return None if weights is None else weights_by_name(corpus.names, weights)

"""From a configuration and its data to the parts of a training run: model, objective, stream."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, get_args

from pretrain import objectives, rng
from pretrain.config import ModelConfig, RunConfig
from pretrain.data.dataset import ShardDataset, Split
from pretrain.data.plan import BatchSize
from pretrain.data.stream import SampleStream, ShardCorpus
from pretrain.data.tokenizer import TextTokenizer
from pretrain.distributed import World
from pretrain.errors import ConfigError, DataError
from pretrain.models import EncoderDecoder, SpecialIds
from pretrain.objectives import ObjectiveModule


def complete_config(settings: RunConfig, dataset: ShardDataset) -> RunConfig:
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


def readable(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    """Text with a box for every MASK."""
    parts = groupby(ids, key=lambda number: number == tokenizer.mask)
    return "".join(" ▢" * len(list(run)) if masked else tokenizer.decode(run) for masked, run in parts)

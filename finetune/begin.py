"""`begin`: a bundle of random weights for a task, so that `train` can make a model of line-aligned text alone.

It reads the configuration that `train` will read: the task whose training pairs give the tokenizer, the seed of the
weights, and the place of the bundle. The bundle claims no more than the layout of a plain Transformer, which reads and
is tuned on the content stream; runner `janus` adds the query stream.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune import tasks
from finetune.config import TuneConfig, with_presets
from finetune.tasks import Pair
from pretrain import config, rng
from pretrain.bundles.bundle import check_replaceable, write_bundle
from pretrain.bundles.description import Description
from pretrain.config import ModelConfig, Section
from pretrain.data.tokenizer import TextTokenizer, check_vocab_size, train_bpe
from pretrain.errors import ConfigError, DataError
from pretrain.models import EncoderDecoder
from pretrain.models.patterns import ArLayout

MODEL = "model."


class ModelFile(Section):
    """A YAML with a section `model`, as in `configs/model`."""

    model: ModelConfig


def begin(
    config_path: str | Path,
    overrides: Sequence[str],
    model_path: str | Path,
    tokenizer: str | None = None,
    train_vocab: int | None = None,
    out: str | Path | None = None,
    query_position_offset: int = 1,
) -> Path:
    """Writes the bundle and returns its folder; the same arguments write the same bundle.

    Args:
        config_path, overrides: of `train`; overrides that begin with `model.` are of `model_path`.
        tokenizer: a tokenizer.json, a folder with one or the id of a Hugging Face repository with one; or
        train_vocab: size of a byte-level BPE to train on both sides of the training pairs. Exactly one of the two.
        out: where to write; None: the `bundle` of the configuration.
        query_position_offset: see `ArLayout`.

    Raises:
        ConfigError, DataError: a bad configuration, tokenizer or task.
        CheckpointError: something else than such a bundle lies there.
    """
    if (tokenizer is None) == (train_vocab is None):
        raise ConfigError("give exactly one of `--tokenizer` and `--train-tokenizer`")
    given = with_presets([one for one in overrides if not one.startswith(MODEL)])
    settings = config.load(TuneConfig, config_path, given)
    shape = config.load(ModelFile, model_path, [one for one in overrides if one.startswith(MODEL)]).model
    folder = Path(settings.bundle if out is None else out)
    check_replaceable(folder)
    pairs = tasks.build(settings.task).pairs("train")
    if not any(pair.source or pair.target for pair in pairs):
        raise DataError(f"the training pairs must hold at least one word, all {len(pairs)} are empty")
    made = _tokenizer(pairs, tokenizer, train_vocab)
    model = _sized(shape, made)
    rng.seed(settings.seed)
    module = EncoderDecoder(model, made.ids, backend="torch")
    layout = ArLayout("bos_first", query_position_offset, made.ids)
    description = Description(model, made.ids, layout, modes=("causal",), objective={})
    write_bundle(folder, module.state_dict(), description, made, _provenance(settings, model, made, len(pairs)))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print(
        f"bundle {folder}: {parameters:,} random parameters, {made.vocab_size:,} tokens, for task "
        f"{settings.task['name']} with {len(pairs):,} training pairs",
        file=sys.stderr,
        flush=True,
    )
    return folder


def _tokenizer(pairs: Sequence[Pair], tokenizer: str | None, train_vocab: int | None) -> TextTokenizer:
    """The one given, or a joint one of sources and targets (Sennrich et al. 2016, section 3.2)."""
    if tokenizer is not None:
        return TextTokenizer.from_path_or_hub(tokenizer)
    assert train_vocab is not None
    check_vocab_size(train_vocab)

    def texts() -> Iterator[str]:
        for pair in pairs:
            yield pair.source
            yield pair.target

    return train_bpe(texts(), train_vocab)


def _sized(model: ModelConfig, tokenizer: TextTokenizer) -> ModelConfig:
    """`model` with the size of its vocabulary."""
    size = model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ConfigError(f"`model.vocab_size` must be at least the tokenizer's {tokenizer.vocab_size}, got {size}")
    return model.model_copy(update={"vocab_size": size})


def _provenance(settings: TuneConfig, model: ModelConfig, tokenizer: TextTokenizer, pairs: int) -> dict[str, Any]:
    """provenance.json: step 0 of the run that will be; another model under its name is not overwritten."""
    return {
        "run": settings.name,
        "step": 0,
        "config": {
            "seed": settings.seed,
            "model": model.model_dump(mode="json"),
            "task": config.complete(tasks.REGISTRY, settings.task, "task"),
        },
        "pairs": {"train": pairs},
        "data": {"tokenizer_sha256": tokenizer.sha256},
    }

"""All tokens at once, each from the first decoder layer that is sure of it; EOS ends the text (ELMER, section 4.3).

The number of MASK rows follows from an option or from the source alone, never from a reference: the released test loop
gives the decoder the length of the reference.

Shapes: B sources, N rows of a text, R rows of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from finetune.decoding.common import USUAL_LENGTH, Exits, Generated, check_length, until_eos
from finetune.decoding.length import candidate_lengths
from pretrain.config import ModelConfig, Section
from pretrain.cost.flops import decoder_flops
from pretrain.errors import ConfigError
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.early_exit import ExitRule, ParallelRows, write_early
from pretrain.models.encoder_decoder import writing
from pretrain.models.patterns import FirstRow
from pretrain.models.rows import LayerWork

USUAL_THRESHOLD = 0.5


class HardExitDecoding(Section):
    """threshold: nats; a token leaves after the first layer where the entropy of its prediction is below; null: what
    the bundle was tuned with, else 0.5.

    rows: how many tokens are written at once: `fixed`, as many as `max_length` allows, or `predicted` by the length
    predictor. max_length: longest text in tokens, with BOS and EOS; null: what the bundle was tuned with, else 64.
    test_layers: the layers, from 1, after which tokens may leave; null: all. An off-ramp over 50,000 words costs as
    much as four layers, so that fewer tests save more than early exits; tokens may leave later than without.
    """

    threshold: Annotated[float, Field(ge=0.0)] | None = None
    rows: Literal["fixed", "predicted"] = "fixed"
    max_length: Annotated[int, Field(ge=3)] | None = None
    test_layers: list[int] | None = None


def check_layers(config: ModelConfig, test_layers: list[int] | None) -> None:
    """Raises ConfigError if a layer cannot be asked: the decoder lacks it, or it is the last."""
    for layer in test_layers or []:
        if not 1 <= layer < config.decoder_layers:
            raise ConfigError(f"`test_layers` must be layers from 1 to {config.decoder_layers - 1}, got {layer}")


def hard_exit(model: EncoderDecoder, source: SourceRows, first_row: FirstRow, options: HardExitDecoding) -> Generated:
    """Texts for packed sources.

    Score: mean log-probability of the written tokens, each at its own layer, EOS counted. Of the special ids only EOS
    is written; a text without it ends with its last row.

    Raises:
        ConfigError: if `max_length` exceeds the model's positions, or a test layer the decoder.
    """
    longest, rule = settled(model, options)
    ids = model.ids
    if not source.n_samples:
        return Generated([], [], 0)
    with writing(model):
        memory_MD = model.encode(source)
        lengths = row_counts(options, longest, source.n_samples, lambda: model.length_logits(memory_MD, source))
        rows = ParallelRows.pack(model, lengths, source, first_row)
        left = write_early(model, rows, memory_MD, rule, ids.never_written)
    made = until_eos(left.token_R.cpu().split(lengths), left.log_p_R.cpu().split(lengths), ids.eos, passes=1)
    exits = np.split(left.exit_R, np.cumsum(lengths)[:-1])
    written = [exit_N[: len(tokens) + 1] for exit_N, tokens in zip(exits, made.tokens, strict=True)]
    return replace(made, exits=exits_of(model.config, np.concatenate(written), left.work, left.scored))


def settled(model: EncoderDecoder, options: HardExitDecoding) -> tuple[int, ExitRule]:
    """The longest text in tokens, and who leaves early; raises ConfigError as `hard_exit`."""
    longest = options.max_length or USUAL_LENGTH
    check_length(model, longest)
    check_layers(model.config, options.test_layers)
    layers = None if options.test_layers is None else tuple(options.test_layers)
    return longest, ExitRule(USUAL_THRESHOLD if options.threshold is None else options.threshold, layers)


def row_counts(options: HardExitDecoding, longest: int, sources: int, logits: Callable[[], Tensor]) -> list[int]:
    """How many rows the text of each source has. logits: [B, N] of the length predictor, where it is asked."""
    if options.rows == "fixed":
        return [longest - 1] * sources
    logits_BN = logits()
    best_B1 = candidate_lengths(logits_BN, 1, "contiguous", min(longest, logits_BN.shape[1] - 1))
    counts: list[int] = (best_B1[:, 0] - 1).tolist()  # BOS has no row
    return counts


def exits_of(config: ModelConfig, exits: np.ndarray, work: Sequence[LayerWork], scored: int) -> Exits:
    """exits: the layer of each written token. work, scored: as in `Left`."""
    counts = np.bincount(exits, minlength=config.decoder_layers + 1)[1:]
    flops = decoder_flops(config, work, scored)
    return Exits(tuple(counts.tolist()), flops.forward, flops.heads)

"""Texts that are written from MASKs alone: rows, targets and previews, which `lplm`, `hard_exit` and `soft_exit` share.

A decoder row i, at position i, predicts t[i + 1]; there may be rows behind the text, which predict nothing.

Shapes: R rows, S rows with a target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import ConfigError
from pretrain.models import SourceRows, pack_streams
from pretrain.models.ids import SpecialIds
from pretrain.models.patterns import FirstRow, all_masks
from pretrain.objectives.base import Example, Preview
from pretrain.objectives.batch import TokenBatch, target_fields

# How many decoder rows a text gets that is written from MASKs alone; see `rows_per_text`.
RowsPerText = Literal["target", "longest"] | Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class MaskBatch(TokenBatch):
    """Every row is computed and used in every layer. rows_B: those of each sample. real_S: which have a target."""

    rows_B: tuple[int, ...]
    real_S: Tensor


def check_rows(wanted: RowsPerText, model: ModelConfig) -> None:
    """Raises ConfigError if there are more rows than positions."""
    if isinstance(wanted, int) and wanted > model.max_positions:
        raise ConfigError(f"`rows` must be at most the model's {model.max_positions} positions, got {wanted}")


def rows_per_text(examples: Sequence[Example], wanted: RowsPerText) -> list[int]:
    """Decoder rows of each example, at least one for every token behind BOS.

    wanted: `target`: no more, so that their number tells the length, which a decoder must then predict; a number: as
    many as it writes with, those behind the text without a target; `longest`: as the longest target has (released).
    """
    tokens = [len(example.target) - 1 for example in examples]
    floor = 0 if wanted == "target" else max(tokens, default=0) if wanted == "longest" else wanted
    return [max(n, floor) for n in tokens]


def padded_targets(examples: Sequence[Example], wanted: RowsPerText, pad: int) -> list[np.ndarray]:
    """What each decoder row of each example has to predict, `pad` for nothing."""
    rows = rows_per_text(examples, wanted)
    return [np.append(e.target[1:], np.full(n - len(e.target) + 1, pad)) for e, n in zip(examples, rows, strict=True)]


def row_labels(targets: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(sample, index into its target) of each row, both int64 [R]."""
    samples = [np.full(len(x), index) for index, x in enumerate(targets)]
    return joined(samples), joined([np.arange(1, len(x) + 1) for x in targets])


def mask_fields(
    examples: Sequence[Example], wanted: RowsPerText, first_row: FirstRow, ids: SpecialIds, length_classes: int
) -> dict[str, Any]:
    """The fields of a `MaskBatch`; its one term is that of the rows with a target."""
    source = SourceRows.pack([example.source for example in examples])
    targets = padded_targets(examples, wanted, ids.pad)
    streams = [all_masks(x, source.memory_range(index), ids, first_row, term=0) for index, x in enumerate(targets)]
    rows, target_L, term_L = pack_streams(streams, source.mask.n_rows)
    row_sample_L, row_position_L = row_labels(targets)
    real_S = (target_L != ids.pad).nonzero().squeeze(1)
    return {
        "source": source,
        "rows": rows,
        "target_L": target_L,
        "term_L": term_L,
        "tuple_PK": torch.empty((0, 1), dtype=torch.int64),
        "row_sample_L": row_sample_L,
        "row_position_L": row_position_L,
        "term_counts": (len(real_S),),
        "rows_B": tuple(len(x) for x in targets),
        "real_S": real_S,
        **target_fields(examples, length_classes),
    }


def mask_previews(batch: TokenBatch, written: Mapping[str, Sequence[Tensor]], bos: int, limit: int) -> list[Preview]:
    """Previews of the first samples. written: per mode and sample the token of each row, those behind it left out."""
    found = []
    for index, target in enumerate(batch.target_T.split(batch.n_target)[:limit]):
        predicted = {mode: [bos, *texts[index][: len(target) - 1].tolist()] for mode, texts in written.items()}
        places = {mode: list(range(1, len(target))) for mode in predicted}
        found.append(Preview(batch.source_tokens(index), target.tolist(), predicted, places))
    return found


def joined(parts: Sequence[np.ndarray]) -> Tensor:
    """int64, one behind the other; empty for none."""
    return torch.from_numpy(np.concatenate([*parts, np.empty(0, np.int64)]))

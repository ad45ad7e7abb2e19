"""What the runners of early exit share: what a bundle was trained with, and with how many rows it writes."""

from typing import Any

from finetune.decoding.common import USUAL_LENGTH
from pretrain import objectives
from pretrain.bundles.description import Description
from pretrain.config import Rate, Section, complete
from pretrain.errors import ConfigError
from pretrain.models.patterns import FirstRow
from pretrain.objectives.from_masks import RowsPerText


class ExitRunnerOptions(Section):
    """rows: by default those of a text of up to 64 tokens with BOS and EOS; BOS has none.

    first_row: null is as the bundle was trained, a MASK where it never was.
    """

    rows: RowsPerText = USUAL_LENGTH - 1
    first_row: FirstRow | None = None
    label_smoothing: Rate = 0.0


def trained_with(description: Description) -> dict[str, Any]:
    """The options of the bundle's objective with presets and defaults; none where nobody knows it."""
    if description.objective.get("name") not in objectives.REGISTRY:
        return {}
    return complete(objectives.REGISTRY, description.objective, "objective")


def first_row_of(options: ExitRunnerOptions, description: Description) -> FirstRow:
    """What the row reads that writes the first token."""
    first: FirstRow = options.first_row or trained_with(description).get("first_row", "mask")
    return first


def rows_of(options: ExitRunnerOptions, description: Description) -> RowsPerText:
    """The rows of a text: those given, as they all are in tuning; else the bundle's own number, else the usual one.

    Raises:
        ConfigError: more are given than a text of the model's positions has.
    """
    most = description.model.max_positions - 1
    if "rows" in options.model_fields_set:
        if isinstance(options.rows, int) and options.rows > most:
            raise ConfigError(
                f"`runner.rows` must be at most {most}, the bundle's {most + 1} positions without that of BOS, "
                f"got {options.rows}"
            )
        return options.rows
    own = trained_with(description).get("rows")
    return min(own if isinstance(own, int) else USUAL_LENGTH - 1, most)


def length_of(max_length: int | None, rows: RowsPerText, description: Description) -> int:
    """The longest text in tokens, with BOS and EOS: as given, else what fills the rows."""
    usual = rows + 1 if isinstance(rows, int) else USUAL_LENGTH
    return max_length or min(usual, description.model.max_positions)

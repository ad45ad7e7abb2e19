"""All tokens at once with hard exits: tuned with every off-ramp or with simulated exits (ELMER, section 4.3)."""

from typing import Any, Literal

from pydantic import Field

from finetune.decoding import Generated, HardExitDecoding, hard_exit
from finetune.decoding.hard_exit import check_layers
from finetune.runners.exits import ExitRunnerOptions, first_row_of, length_of, rows_of, trained_with
from pretrain.bundles.description import Description, Mode
from pretrain.errors import ConfigError
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.objectives.hard_exit import Threshold


class HardExitRunnerOptions(ExitRunnerOptions):
    """training, threshold, rows, first_row, detach_copied_state, label_smoothing, length_weight: of the objective.

    rows: by default 63. With `target` a model takes the length from the number of rows, so that `decoding.rows` must be
    `predicted` and `length_weight` above 0. decoding: of generation in validation; where it names no `max_length` it
    writes as many rows as were tuned, and where it names no `threshold` tokens leave at that of tuning.
    """

    name: Literal["hard_exit"] = "hard_exit"
    training: Literal["all", "simulated"] = "all"
    threshold: Threshold = 0.5
    detach_copied_state: bool = True
    length_weight: float = Field(0.0, ge=0.0)
    decoding: HardExitDecoding = HardExitDecoding()


class HardExitRunner:
    """Cross-entropy of all tokens at several layers; one pass in which tokens leave early.

    Raises:
        ConfigError: `decoding.rows` is `predicted` where no length predictor was or will be trained, or `fixed` where
            `rows` is `target`; `rows` is a number that the model has no positions for; a test layer does not exist.
    """

    def __init__(self, options: HardExitRunnerOptions, description: Description) -> None:
        self.modes: tuple[Mode, ...] = ("hard_exit",)
        self.model = description.model
        self.first_row = first_row_of(options, description)
        rows, threshold = rows_of(options, description), _threshold_of(options, description)
        self.objective: dict[str, Any] = {
            "name": "hard_exit",
            "training": options.training,
            "threshold": threshold,
            "rows": rows,
            "first_row": self.first_row,
            "detach_copied_state": options.detach_copied_state,
            "label_smoothing": options.label_smoothing,
            "length_weight": options.length_weight,
        }
        decoding = options.decoding
        check_layers(description.model, decoding.test_layers)
        if rows == "target" and not (decoding.rows == "predicted" and options.length_weight > 0):
            raise ConfigError(
                "`runner.rows` must be a number or `longest` unless `decoding.rows` is `predicted` and `length_weight` "
                f"above 0, got `target` with `{decoding.rows}` and {options.length_weight:g}: it tells the length"
            )
        if decoding.rows == "predicted" and not (description.length_trained or options.length_weight > 0):
            raise ConfigError(
                "`decoding.rows` must be `fixed` where no length predictor was trained, got `predicted`: "
                "tune with `runner.length_weight` above 0"
            )
        changes = {
            "max_length": length_of(decoding.max_length, rows, description),
            "threshold": threshold if decoding.threshold is None else decoding.threshold,
        }
        self.decoding = decoding.model_copy(update=changes)

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        return hard_exit(model, source, self.first_row, self.decoding)


def _threshold_of(options: HardExitRunnerOptions, description: Description) -> float:
    """The threshold given, as it is in tuning; else what the bundle was tuned with."""
    threshold = options.threshold
    if "threshold" not in options.model_fields_set:
        threshold = trained_with(description).get("threshold", threshold)
    return threshold

"""All tokens at once with hard exits: tuned with every off-ramp or with simulated exits (ELMER, section 4.3)."""

from typing import Any, Literal

from pydantic import Field

from finetune.decoding import Generated, HardExitDecoding, hard_exit
from finetune.decoding.hard_exit import check_layers
from pretrain import objectives
from pretrain.bundles.description import Description, Mode
from pretrain.config import Rate, Section, validate
from pretrain.errors import ConfigError
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.patterns import FirstRow
from pretrain.objectives.batch import RowsPerText
from pretrain.objectives.hard_exit import Threshold


class HardExitRunnerOptions(Section):
    """training, threshold, rows, first_row, detach_copied_state, label_smoothing, length_weight: of the objective.

    rows: by default 63, the rows of a text of up to 64 tokens with BOS and EOS. With `target` a model takes the length
    from the number of rows, so that `decoding.rows` should be `predicted` and `length_weight` above 0.
    first_row: null is as the bundle was trained. decoding: of generation in validation; where it names no `max_length`
    it writes as many rows as were tuned.
    """

    name: Literal["hard_exit"] = "hard_exit"
    training: Literal["all", "simulated"] = "all"
    threshold: Threshold = 0.5
    rows: RowsPerText = 63
    first_row: FirstRow | None = None
    detach_copied_state: bool = True
    label_smoothing: Rate = 0.0
    length_weight: float = Field(0.0, ge=0.0)
    decoding: HardExitDecoding = HardExitDecoding()


class HardExitRunner:
    """Cross-entropy of all tokens at several layers; one pass in which tokens leave early.

    Raises:
        ConfigError: `decoding.rows` is `predicted` where no length predictor was or will be trained, or a test layer
            does not exist.
    """

    def __init__(self, options: HardExitRunnerOptions, description: Description) -> None:
        self.modes: tuple[Mode, ...] = ("hard_exit",)
        self.model = description.model
        trained = _trained_with(description)
        self.first_row: FirstRow = options.first_row or trained.get("first_row", "mask")
        self.objective: dict[str, Any] = {
            "name": "hard_exit",
            "training": options.training,
            "threshold": options.threshold,
            "rows": options.rows,
            "first_row": self.first_row,
            "detach_copied_state": options.detach_copied_state,
            "label_smoothing": options.label_smoothing,
            "length_weight": options.length_weight,
        }
        check_layers(description.model, options.decoding.test_layers)
        if options.decoding.rows == "predicted" and not (description.length_trained or options.length_weight > 0):
            raise ConfigError(
                "`decoding.rows` must be `fixed` where no length predictor was trained, got `predicted`: "
                "tune with `runner.length_weight` above 0"
            )
        # A bundle that was tuned with a number of rows writes as many, and so does one that is being tuned.
        inherits = trained.get("name") == "hard_exit" and "rows" not in options.model_fields_set
        rows = trained["rows"] if inherits else options.rows
        usual = min(rows + 1 if isinstance(rows, int) else 64, description.model.max_positions)
        self.decoding = options.decoding.model_copy(update={"max_length": options.decoding.max_length or usual})

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        return hard_exit(model, source, self.first_row, self.decoding)


def _trained_with(description: Description) -> dict[str, Any]:
    """The options of the bundle's objective, with defaults; none where it is of another kind."""
    kind = objectives.REGISTRY.get(str(description.objective.get("name")))
    if kind is None:
        return {}
    return validate(kind[0], dict(description.objective), where="objective").model_dump(mode="json")

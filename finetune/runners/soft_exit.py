"""Soft exit: all tokens at once, every layer trained to write and fed what the one below it would write."""

from typing import Any, Literal

from finetune.decoding import Generated
from finetune.decoding.soft_exit import SoftExitDecoding, soft_exit
from pretrain.bundles.description import Description, Mode
from pretrain.config import Fraction, Rate, Section
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.patterns import FirstRow
from pretrain.objectives.batch import RowsPerText


class SoftExitRunnerOptions(Section):
    """label_smoothing, given, rows, first_row: of the objective `soft_exit`; see there. decoding: of generation.

    first_row: null: what the bundle was trained with, a MASK where it never was. rows: null: as many as decoding has.
    """

    name: Literal["soft_exit"] = "soft_exit"
    label_smoothing: Rate = 0.0
    given: Fraction = 0.3
    first_row: FirstRow | None = None
    rows: RowsPerText | None = None
    decoding: SoftExitDecoding = SoftExitDecoding()


class SoftExit:
    """Cross-entropy after every layer; one pass, cut at EOS. A bundle without a feedback projection gets one."""

    def __init__(self, options: SoftExitRunnerOptions, description: Description) -> None:
        self.options = options
        self.modes: tuple[Mode, ...] = ("soft_exit",)
        self.model = description.model.model_copy(update={"soft_exit": True})
        self.first_row: FirstRow = options.first_row or description.objective.get("first_row", "mask")
        self.objective: dict[str, Any] = {
            "name": "soft_exit",
            "first_row": self.first_row,
            "rows": options.rows or options.decoding.max_length - 1,
            "given": options.given,
            "label_smoothing": options.label_smoothing,
        }

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        return soft_exit(model, source, self.first_row, self.options.decoding)

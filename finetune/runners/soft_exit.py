"""Soft exit: all tokens at once, every layer trained to write and fed what the one below it would write."""

from typing import Any, Literal

from finetune.decoding import Generated
from finetune.decoding.soft_exit import SoftExitDecoding, soft_exit
from finetune.runners.exits import ExitRunnerOptions, first_row_of, length_of, rows_of
from pretrain.bundles.description import Description, Mode
from pretrain.config import Fraction
from pretrain.errors import ConfigError
from pretrain.models import EncoderDecoder, SourceRows


class SoftExitRunnerOptions(ExitRunnerOptions):
    """given, rows, first_row, label_smoothing: of the objective `soft_exit`; see there.

    rows: by default 63; never `target`, which tells the length, and nothing here predicts one. decoding: of generation
    in validation; where it names no `max_length` it writes as many rows as were tuned.
    """

    name: Literal["soft_exit"] = "soft_exit"
    given: Fraction = 0.3
    decoding: SoftExitDecoding = SoftExitDecoding()


class SoftExit:
    """Cross-entropy after every layer; one pass, cut at EOS. A bundle without a feedback projection gets one.

    Raises:
        ConfigError: `rows` is `target`, or a number that the model has no positions for.
    """

    def __init__(self, options: SoftExitRunnerOptions, description: Description) -> None:
        if options.rows == "target":
            raise ConfigError(
                "`runner.rows` must be a number or `longest` with soft_exit, got `target`: it tells the length of a "
                "text, and soft exit predicts none"
            )
        self.modes: tuple[Mode, ...] = ("soft_exit",)
        self.model = description.model.model_copy(update={"soft_exit": True})
        self.first_row = first_row_of(options, description)
        rows = rows_of(options, description)
        self.objective: dict[str, Any] = {
            "name": "soft_exit",
            "first_row": self.first_row,
            "rows": rows,
            "given": options.given,
            "label_smoothing": options.label_smoothing,
        }
        longest = length_of(options.decoding.max_length, rows, description)
        self.decoding = options.decoding.model_copy(update={"max_length": longest})

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        return soft_exit(model, source, self.first_row, self.decoding)

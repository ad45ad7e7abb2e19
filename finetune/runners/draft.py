"""Left to right in blocks: tuned with the whole JANUS loss, drafted by the NAR pattern, verified by AR."""

from typing import Any, Literal

from finetune.decoding import DraftDecoding, Generated, draft
from pretrain.bundles.description import Description, Mode
from pretrain.config import Rate, Section
from pretrain.models import EncoderDecoder, SourceRows


class DraftOptions(Section):
    """label_smoothing: of the training loss. decoding: of generation in validation."""

    name: Literal["draft"] = "draft"
    label_smoothing: Rate = 0.1
    decoding: DraftDecoding = DraftDecoding()


class Draft:
    """All terms of JANUS with any share of the text hidden; greedy search in blocks."""

    def __init__(self, options: DraftOptions, description: Description) -> None:
        self.options, self.layout, self.model = options, description.layout, description.model
        self.modes: tuple[Mode, ...] = ("ar", "nar")
        self.objective: dict[str, Any] = {
            "name": "janus",
            "ar_layout": self.layout.layout,
            "ar_query_position_offset": self.layout.query_position_offset,
            "label_smoothing": options.label_smoothing,
            "pair_masking": "uniform",
        }

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        return draft(model, source, self.layout, self.options.decoding)

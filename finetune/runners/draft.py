"""Left to right in blocks, drafted by the NAR pattern, verified by AR; runner `janus` trains both."""

from typing import Literal

from finetune.decoding import DraftDecoding, Generated, draft
from pretrain.bundles.description import Description
from pretrain.config import Section
from pretrain.models import EncoderDecoder, SourceRows


class DraftOptions(Section):
    """Only of writing."""

    name: Literal["draft"] = "draft"
    decoding: DraftDecoding = DraftDecoding()


class Draft:
    """Greedy search in blocks. It tunes nothing: what it says of training is what the bundle was trained with."""

    def __init__(self, options: DraftOptions, description: Description) -> None:
        self.options, self.layout, self.model = options, description.layout, description.model
        self.modes, self.objective = description.modes, dict(description.objective)

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        return draft(model, source, self.layout, self.options.decoding)

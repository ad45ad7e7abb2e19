"""All tokens at once: tuned with uniformly masked targets and the length predictor, written by mask-predict."""

from typing import Any, Literal

from finetune.decoding import Generated, MaskPredictOptions, mask_predict
from pretrain.bundles.description import Description, Mode
from pretrain.config import Positive, Rate, Section
from pretrain.models import EncoderDecoder, SourceRows


class NarOptions(Section):
    """label_smoothing, length_weight: of the training loss. decoding: of generation in validation."""

    name: Literal["nar"] = "nar"
    label_smoothing: Rate = 0.1
    length_weight: Positive = 0.1
    decoding: MaskPredictOptions = MaskPredictOptions()


class Nar:
    """Cross-entropy of masked tokens and of the length; mask-predict."""

    def __init__(self, options: NarOptions, description: Description) -> None:
        self.options = options
        self.modes: tuple[Mode, ...] = ("nar",)
        self.model = description.model
        self.objective: dict[str, Any] = {
            "name": "cmlm",
            "label_smoothing": options.label_smoothing,
            "length_weight": options.length_weight,
        }

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        return mask_predict(model, source, self.options.decoding)

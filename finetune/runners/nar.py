"""All tokens at once: tuned with masked targets and the length predictor, written by mask-predict."""

from typing import Any, Literal

from finetune.decoding import Generated, MaskPredictOptions, mask_predict
from pretrain.bundles.description import Description, Mode
from pretrain.config import Positive, Rate, Section
from pretrain.models import EncoderDecoder, SourceRows

Training = Literal["cmlm", "cmlm_corr", "rdrop"]


class NarOptions(Section):
    """training: the objective. label_smoothing, length_weight: of its loss. decoding: of generation in validation.

    * `cmlm` (default): cross-entropy of uniformly masked tokens (Ghazvininejad et al. 2019).
    * `cmlm_corr`: CMLM that also corrects tokens it has written; every pass of mask-predict then rewrites all of them.
    * `rdrop`: NAR and AUX on two dropout copies of the batch, tied by R-Drop, as the JANUS repository tunes.
    """

    name: Literal["nar"] = "nar"
    training: Training = "cmlm"
    label_smoothing: Rate = 0.1
    length_weight: Positive = 0.1
    decoding: MaskPredictOptions = MaskPredictOptions()


class Nar:
    """Cross-entropy of masked tokens and of the length; mask-predict."""

    def __init__(self, options: NarOptions, description: Description) -> None:
        tuning = "training" in options.model_fields_set
        corrects = (options.training if tuning else description.objective.get("name")) == "cmlm_corr"
        decoding = options.decoding
        self.decoding = decoding.model_copy(update={"rewrite": decoding.rewrite or ("all" if corrects else "hidden")})
        self.modes: tuple[Mode, ...] = ("nar",)
        self.model = description.model
        self.objective: dict[str, Any] = {
            "name": options.training,
            "label_smoothing": options.label_smoothing,
            "length_weight": options.length_weight,
        }

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        return mask_predict(model, source, self.decoding)

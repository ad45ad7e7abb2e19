"""Both ways at once: the whole JANUS loss on pairs, for fine-tuning and for translation models from random weights."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from finetune.decoding import ArDecoding, Generated, MaskPredictOptions
from finetune.runners.ar import Ar, ArOptions
from finetune.runners.base import Runner, with_modes
from finetune.runners.nar import Nar, NarOptions
from pretrain.bundles.description import Description, Mode
from pretrain.config import Fraction, Positive, Rate, Section
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.objectives.base import from_preset
from pretrain.objectives.janus import PRESETS, JanusWeights

# What the translation code has besides the layout of its AR pattern, which belongs to the bundle.
TUNED = ("share_encoder", "weights", "label_smoothing")
TUNING_PRESETS = {"paper": {}, "released": {name: PRESETS["released"][name] for name in TUNED}}


class BothWeights(JanusWeights):
    """Factor of each term. The length is trained in any case: nothing is written all at once without it."""

    length: Positive = 0.1


class BothDecodings(Section):
    """Of generation in validation, in each way."""

    ar: ArDecoding = ArDecoding()
    nar: MaskPredictOptions = MaskPredictOptions()


class JanusRunnerOptions(Section):
    """Options of the objective `janus`, whose `ar_layout` is the bundle's; and of writing.

    `preset` fills in what is not given: `paper` (default), or `released`, the translation code. Terms of weight 0 are
    measured and not trained: the rows of the paper's ablation (JANUS, Table 6) are weights. decoding: of generation in
    validation, a section for each way.
    """

    name: Literal["janus"] = "janus"
    preset: Literal["paper", "released"] = "paper"
    share_encoder: bool = True
    weights: BothWeights = BothWeights()
    label_smoothing: Rate = 0.1
    pair_masking: Literal["spans", "uniform"] = "spans"
    pair_ratio: Fraction = 0.7
    pair_mean_span: Positive = 2.0
    decoding: BothDecodings = BothDecodings()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        return from_preset(values, TUNING_PRESETS)


class Janus:
    """AR, NAR and AUX with their KLs; beam search and mask-predict. ways: {mode: what writes so}."""

    def __init__(self, options: JanusRunnerOptions, description: Description) -> None:
        self.modes: tuple[Mode, ...] = ("ar", "nar")
        self.model = description.model
        self.objective: dict[str, Any] = {
            "name": "janus",
            "ar_layout": description.layout.layout,
            "ar_query_position_offset": description.layout.query_position_offset,
            **options.model_dump(mode="json", exclude={"name", "preset", "decoding"}),
        }
        tuned = with_modes(description, self)
        self.ways: Mapping[str, Runner] = {
            "ar": Ar(ArOptions(decoding=options.decoding.ar), tuned),
            "nar": Nar(NarOptions(decoding=options.decoding.nar), tuned),
        }

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        return self.ways["ar"].generate(model, source)

"""Left to right: JANUS bundles read and are tuned on the query stream, plain BART bundles on the content stream."""

from typing import Any, Literal

from finetune.decoding import ArDecoding, Generated, beam_search, sample
from pretrain.bundles.description import Description, Mode
from pretrain.config import Rate, Section
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.incremental import StreamName

ONLY_AR = {"ar": 1.0, "nar": 0.0, "aux": 0.0, "kl_ar_aux": 0.0, "kl_nar_aux": 0.0, "kl_ar_nar": 0.0, "length": 0.0}


class ArOptions(Section):
    """label_smoothing: of the training loss. decoding: of generation in validation."""

    name: Literal["ar"] = "ar"
    label_smoothing: Rate = 0.1
    decoding: ArDecoding = ArDecoding()


class Ar:
    """Cross-entropy of the next token; beam search or sampling."""

    def __init__(self, options: ArOptions, description: Description) -> None:
        self.options, self.layout, self.model = options, description.layout, description.model
        two_streams = "ar" in description.modes
        self.stream: StreamName = "query" if two_streams else "content"
        self.modes: tuple[Mode, ...] = ("ar",) if two_streams else ("causal",)
        self.objective: dict[str, Any] = {
            "name": "denoise",
            "ar_layout": self.layout.layout,
            "label_smoothing": options.label_smoothing,
        }
        if two_streams:
            # With nothing masked the NAR and AUX streams have no rows and cost nothing.
            self.objective |= {
                "name": "janus",
                "ar_query_position_offset": self.layout.query_position_offset,
                "weights": ONLY_AR,
                "pair_masking": "spans",
                "pair_ratio": 0.0,
            }

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        decoding = self.options.decoding
        write = sample if decoding.sample else beam_search
        return write(model, source, self.layout, self.stream, decoding)

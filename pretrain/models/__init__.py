"""The encoder-decoder on packed rows. Models know nothing of objectives, engines or files."""

from pretrain.models.encoder_decoder import EncoderDecoder, VocabTargets
from pretrain.models.exits import ExitRows, ExitSample, pack_exits
from pretrain.models.ids import SpecialIds
from pretrain.models.rows import DecoderRows, SourceRows, Stream, pack_streams

__all__ = [
    "DecoderRows",
    "EncoderDecoder",
    "ExitRows",
    "ExitSample",
    "SourceRows",
    "SpecialIds",
    "Stream",
    "VocabTargets",
    "pack_exits",
    "pack_streams",
]

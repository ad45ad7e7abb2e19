"""Decoders: functions of a model and a batch of sources. None of them can be given a reference."""

from finetune.decoding.beam import BeamOptions, beam_search
from finetune.decoding.common import Generated, writing
from finetune.decoding.mask_predict import MaskPredictOptions, mask_predict

__all__ = ["BeamOptions", "Generated", "MaskPredictOptions", "beam_search", "mask_predict", "writing"]

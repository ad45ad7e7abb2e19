"""Decoders: functions of a model and a batch of sources. None of them can be given a reference."""

from finetune.decoding.beam import beam_search
from finetune.decoding.common import Drafts, Exits, Generated
from finetune.decoding.draft import DraftDecoding, draft
from finetune.decoding.hard_exit import HardExitDecoding, hard_exit
from finetune.decoding.left_to_right import ArDecoding
from finetune.decoding.mask_predict import MaskPredictOptions, mask_predict
from finetune.decoding.sample import sample

__all__ = [
    "ArDecoding",
    "DraftDecoding",
    "Drafts",
    "Exits",
    "Generated",
    "HardExitDecoding",
    "MaskPredictOptions",
    "beam_search",
    "draft",
    "hard_exit",
    "mask_predict",
    "sample",
]

"""Soft exit: one decoder pass, in which each layer is fed what the layer below would have written.

Nothing is skipped; a text ends at its first EOS (ELMER, section 4.3).
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from finetune.decoding.common import USUAL_LENGTH, Generated, check_length, most_likely, until_eos
from pretrain.config import Section
from pretrain.models import EncoderDecoder, SourceRows, pack_streams
from pretrain.models.encoder_decoder import writing
from pretrain.models.patterns import FirstRow, all_masks
from pretrain.models.soft_exit import decode_soft


class SoftExitDecoding(Section):
    """max_length: longest text in tokens, with BOS and EOS; the decoder has a row for each but BOS.

    null: what the bundle was tuned with, else 64.
    """

    max_length: Annotated[int, Field(ge=3)] | None = None


def soft_exit(model: EncoderDecoder, source: SourceRows, first_row: FirstRow, options: SoftExitDecoding) -> Generated:
    """Texts for packed sources. Score: mean log-probability of the tokens with EOS. Special ids are never written.

    Raises:
        ConfigError: if `max_length` exceeds the model's positions.
    """
    longest = options.max_length or USUAL_LENGTH
    check_length(model, longest)
    if not source.n_samples:
        return Generated([], [], 0)
    ids, n = model.ids, longest - 1
    nothing = np.full(n, ids.pad)  # to predict
    ranges = [source.memory_range(index) for index in range(source.n_samples)]
    streams = [all_masks(nothing, memory, ids, first_row, term=0) for memory in ranges]
    device = model.shared.weight.device
    with writing(model):
        rows = pack_streams(streams, source.mask.n_rows)[0].to(device)
        states = decode_soft(model, rows, model.encode(source))
        token_L, score_L = most_likely(model, states[-1], ids.never_written)
    return until_eos(token_L.cpu().split(n), score_L.cpu().split(n), ids.eos, passes=1)

"""Mask-predict: write all tokens at once, then hide the least certain ones and write those again (JANUS, 3.4).

T = iterations + 1 decoder passes: `iterations` counts refinements after the first pass, as the papers count. After
pass t the floor(N (T - t) / T) tokens of lowest log-probability are hidden, N content tokens, in integers.

Shapes: B sources, C candidates (source x length), T tokens of the longest candidate, R packed rows, L hidden rows.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from finetune.decoding.common import Generated, most_likely, writing
from finetune.decoding.length import candidate_lengths
from parlance_kernels import SampleMask
from pretrain.config import Section
from pretrain.errors import ConfigError
from pretrain.models import DecoderRows, EncoderDecoder, SourceRows
from pretrain.models.incremental import decode_over, project_memory


class MaskPredictOptions(Section):
    """iterations: refinements after the first pass. length_beam, length_choice: candidate lengths per source.

    max_length: longest candidate in tokens, with BOS and EOS. early_stop: a candidate whose tokens a pass left as
    they were is finished; saves passes and may rarely change a text, because a later pass hides other tokens.
    """

    iterations: int = Field(4, ge=0, le=1000)
    length_beam: int = Field(3, ge=1, le=100)
    length_choice: Literal["contiguous", "topk"] = "contiguous"
    max_length: int = Field(64, ge=3)
    early_stop: bool = False


def hidden_count(content: int | np.ndarray, done: int, total: int) -> int | np.ndarray:
    """Tokens to hide after `done` of `total` passes over `content` tokens: floor(content (total - done) / total)."""
    return content * (total - done) // total


def mask_predict(model: EncoderDecoder, source: SourceRows, options: MaskPredictOptions) -> Generated:
    """Texts for packed sources. Score: mean log-probability over the length with BOS and EOS, which count 0.

    The best candidate length of each source wins. Special ids are never written. Every pass calls the decoder even
    if nothing is hidden any more, so without `early_stop` passes = iterations + 1.

    Raises:
        ConfigError: if `max_length` exceeds the model's positions.
    """
    if options.max_length > model.config.max_positions:
        raise ConfigError(
            f"`max_length` must be at most the model's {model.config.max_positions} positions, got {options.max_length}"
        )
    if not source.n_samples:
        return Generated([], [], 0)
    with writing(model):
        memory_MD = model.encode(source)
        longest = min(options.max_length, model.config.length_classes - 1)
        lengths_BK = candidate_lengths(
            model.length_logits(memory_MD, source), options.length_beam, options.length_choice, longest
        )
        candidates = _Candidates(model, source, lengths_BK.numpy())
        memory = project_memory(model, memory_MD)
        passes, total = 0, options.iterations + 1
        for done in range(1, total + 1):
            before_CT = candidates.tokens_CT.clone()
            candidates.fill(memory)
            passes += 1
            if options.early_stop and done > 1:
                # Compared before tokens are hidden again: a finished text holds no MASK.
                candidates.finish((candidates.tokens_CT == candidates.complete_CT).all(dim=1))
                if not candidates.active_C.any():
                    break
            del before_CT
            if done < total:
                candidates.hide(done, total)
        return candidates.best(passes)

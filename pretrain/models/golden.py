"""A checkpoint carries its own test: a fixed input and the logits it must give in every mode.

Shapes: S source tokens, T target tokens, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain.models.encoder_decoder import EncoderDecoder
from pretrain.models.exits import ExitRows, ExitSample, pack_exits
from pretrain.models.patterns import ArLayout, ar_two_stream, causal, mask_rows, nar
from pretrain.models.rows import DecoderRows, SourceRows, Stream, pack_streams

MODES = ("ar", "nar", "causal", "hard_exit")
SOURCE_TOKENS, TARGET_TOKENS = 12, 10


@torch.no_grad()
def golden(model: EncoderDecoder, layout: ArLayout, modes: Sequence[str]) -> dict[str, Tensor]:
    """`in/source` int64 [S], `in/target` int64 [T], `logits/length`, and `logits/<mode>` [rows, V] in eval mode.

    modes: of `ar` (query stream over the target), `nar` (every content token masked), `causal` (content stream),
    `hard_exit` (MASK rows that leave at layers 1, 2, .. in turn).
    """
    ids = layout.ids
    vocabulary = model.config.vocab_size or 0
    spread = (np.arange(SOURCE_TOKENS + TARGET_TOKENS) * 7919 + 13) % vocabulary
    source, target = spread[:SOURCE_TOKENS].copy(), spread[SOURCE_TOKENS:].copy()
    source[0] = target[0] = ids.bos
    source[-1] = target[-1] = ids.eos
    was_training = model.training
    model.eval()
    made = {"in/source": torch.from_numpy(source), "in/target": torch.from_numpy(target)}
    rows = SourceRows.pack([source])
    memory = model.encode(rows)
    made["logits/length"] = model.length_logits(memory, rows)[0]
    for mode in modes:
        packed: DecoderRows | ExitRows
        if mode == "hard_exit":
            n, layers = len(target) - 1, model.config.decoder_layers
            sample = ExitSample(
                mask_rows(n, ids, "mask"), np.arange(n), (0, len(source)), np.arange(n)[None] % layers + 1
            )
            packed = pack_exits([sample], layers, len(source), detach=False)
        else:
            packed, _, _ = pack_streams(_streams(mode, target, layout), len(source))
        made[f"logits/{mode}"] = model.logits(model.decode(packed, memory))
    model.train(was_training)
    return {name: value.detach().cpu().contiguous() for name, value in made.items()}


def _streams(mode: str, target: np.ndarray, layout: ArLayout) -> list[Stream]:
    memory = (0, SOURCE_TOKENS)
    if mode == "ar":
        return list(ar_two_stream(target, memory, layout, term=0))
    if mode == "causal":
        return [causal(target, memory, layout, term=0)]
    if mode == "nar":
        return [nar(target, np.arange(1, len(target) - 1), memory, layout.ids.mask, term=0)]
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")

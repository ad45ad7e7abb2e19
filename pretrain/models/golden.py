"""A checkpoint carries its own test: a fixed input and the logits it must give in every mode.

Shapes: S source tokens, T target tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.models.encoder_decoder import EncoderDecoder, writing
from pretrain.models.exits import ExitSample, pack_exits
from pretrain.models.patterns import ArLayout, all_masks, ar_two_stream, causal, nar
from pretrain.models.rows import SourceRows, pack_streams
from pretrain.models.soft_exit import decode_soft

SOURCE_TOKENS, TARGET_TOKENS = 12, 10


def golden(model: EncoderDecoder, layout: ArLayout, modes: Sequence[str]) -> dict[str, Tensor]:
    """`in/source` int64 [S], `in/target` int64 [T], `logits/length`, and `logits/<mode>` [rows, V] in eval mode.

    modes: of `ar` (query stream over the target), `nar` (every content token masked), `causal` (content stream),
    `hard_exit` (MASK rows that leave at layers 1, 2, .. in turn), `soft_exit` (MASK rows, after the last layer).
    """
    ids = layout.ids
    vocabulary = model.config.vocab_size or 0
    spread = (np.arange(SOURCE_TOKENS + TARGET_TOKENS) * 7919 + 13) % vocabulary
    source, target = spread[:SOURCE_TOKENS].copy(), spread[SOURCE_TOKENS:].copy()
    source[0] = target[0] = ids.bos
    source[-1] = target[-1] = ids.eos
    made = {"in/source": torch.from_numpy(source), "in/target": torch.from_numpy(target)}
    rows = SourceRows.pack([source])
    with writing(model):
        memory = model.encode(rows)
        made["logits/length"] = model.length_logits(memory, rows)[0]
        for mode in modes:
            packed = _rows(mode, target, layout, model.config.decoder_layers)
            h_LD = decode_soft(model, packed, memory)[-1] if mode == "soft_exit" else model.decode(packed, memory)
            sizes = packed.sizes if mode == "hard_exit" else [0] * (model.config.decoder_layers - 1) + [len(h_LD)]
            by_layer = enumerate(h_LD.split(list(sizes)), start=1)
            made[f"logits/{mode}"] = torch.cat([model.ramp(layer)(part) for layer, part in by_layer])
    return {name: value.detach().cpu().contiguous() for name, value in made.items()}


def _rows(mode: str, target: np.ndarray, layout: ArLayout, layers: int) -> Any:
    """The decoder's input in a mode."""
    memory, ids, n = (0, SOURCE_TOKENS), layout.ids, len(target) - 1
    if mode == "hard_exit":
        exits = np.arange(n)[None] % layers + 1
        return pack_exits([ExitSample.masks(exits, memory, ids, "mask")], layers, SOURCE_TOKENS, detach=False)
    streams = {
        "ar": lambda: list(ar_two_stream(target, memory, layout, term=0)),
        "causal": lambda: [causal(target, memory, layout, term=0)],
        "nar": lambda: [nar(target, np.arange(1, n), memory, ids.mask, term=0)],
        "soft_exit": lambda: [all_masks(target[1:], memory, ids, "mask", term=0)],
    }
    if mode not in streams:
        raise ValueError(f"mode must be one of {', '.join((*streams, 'hard_exit'))}, got {mode!r}")
    return pack_streams(streams[mode](), SOURCE_TOKENS)[0]

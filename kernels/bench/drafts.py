"""Seconds to write one text by greedy search over self-drafting, on a CPU, with the same weights; see `latency.py`.

What drafting saves depends on how well a network drafts. Two networks frame it: that of `latency.py`, and the same
without self-attention in its decoder, in which AR and NAR rows of a place are equal and every draft is right.
`python -m finetune generate --mode draft --compare` shows it for a trained one.
"""

from copy import deepcopy
from typing import cast

import torch
from harness import Row, medians, require
from latency import IDS, REPEATS, SHAPE, TOKENS, ours, source

from finetune.decoding import ArDecoding, DraftDecoding, Generated, beam_search, draft
from pretrain.models import EncoderDecoder
from pretrain.models.layers import DecoderLayer
from pretrain.models.patterns import ArLayout

LAYOUT = ArLayout.aligned("bos_first", IDS)
LENGTH = TOKENS + 1  # with BOS, which no pass writes


def rows() -> list[Row]:
    """`draft_random`, `draft_all_right`: greedy search on the query stream over drafting with the usual block."""
    return [_row("draft_random", ours(), "random weights"), _row("draft_all_right", _blind(), "every draft is right")]


def _row(name: str, model: EncoderDecoder, what: str) -> Row:
    found, expected = _draft(model), _greedy(model)
    require(found.tokens[0].tolist() == expected.tokens[0].tolist(), f"{name}: both must write the same tokens")
    require(found.drafts is not None and expected.passes == TOKENS, f"{name}: the text must have {TOKENS} tokens")
    greedy, drafted = medians([lambda: _greedy(model), lambda: _draft(model)], REPEATS)
    detail = (
        f"greedy {greedy * 1e3:.0f} ms, {expected.passes} passes, over {drafted * 1e3:.0f} ms, {found.passes} passes; "
        f"{what}; same {TOKENS - 1} token ids; {SHAPE}"
    )
    return Row(name, greedy / drafted, None, "report", detail)


def _greedy(model: EncoderDecoder) -> Generated:
    return beam_search(model, source(), LAYOUT, "query", ArDecoding(beam=1, max_length=LENGTH))


def _draft(model: EncoderDecoder) -> Generated:
    return draft(model, source(), LAYOUT, DraftDecoding(max_length=LENGTH))


def _blind() -> EncoderDecoder:
    """The same weights with a decoder that does not read its own text."""
    model = deepcopy(ours())
    for layer in model.decoder.layers:
        torch.nn.init.zeros_(cast(DecoderLayer, layer).self_attn.out_proj.weight)
    return model

"""Seconds to write one text all at once, by all layers, by soft exit and by hard exit, on a CPU; see `latency.py`.

Random weights are never sure, so hard exit is shown at its ends: at 0.5 nobody leaves and every off-ramp was asked for
nothing; above ln V everybody leaves at the first layer. `python -m finetune sweep-threshold` shows what lies between
for a trained model.
"""

from functools import cache

import numpy as np
import torch
from harness import Row, medians, require
from latency import ATTENTIONS, CONFIG, IDS, REPEATS, SHAPE, TOKENS, ours, source, their_beam, theirs

from finetune.decoding import Generated
from finetune.decoding.hard_exit import HardExitDecoding, hard_exit
from finetune.decoding.soft_exit import SoftExitDecoding, soft_exit
from pretrain.models import EncoderDecoder, reference
from pretrain.models.layers import DecoderLayer

NEVER_SURE, ALWAYS_SURE = 0.5, 11.0  # below any entropy of random weights, and above ln 50,265
LENGTH = TOKENS + 1  # with BOS, which has no row


def rows() -> list[Row]:
    """`exit_latency`: transformers' greedy search over one pass; the others: a way to exit over one pass without."""
    agreed = _check()
    runs = [lambda a=a: their_beam(a, beam=1) for a in ATTENTIONS]
    ways = [
        lambda: _hard(0.0),
        lambda: soft_exit(_fed(), source(), "mask", SoftExitDecoding(max_length=LENGTH)),
        lambda: _hard(NEVER_SURE),
        lambda: _hard(NEVER_SURE, [2]),
        lambda: _hard(ALWAYS_SURE),
    ]
    *greedy, plain, soft, asked, once, first = medians([*runs, *ways], REPEATS)
    theirs_ms, plain_ms = min(greedy) * 1e3, plain * 1e3
    detail = f"transformers greedy {theirs_ms:.0f} ms over {plain_ms:.0f} ms; {agreed}; {SHAPE}"
    over = f"over {plain_ms:.0f} ms of one pass through all layers"
    return [
        Row("exit_latency", min(greedy) / plain, 8.0, "min", detail),
        Row("exit_latency_soft", min(greedy) / soft, None, "report", f"soft exit, {soft * 1e3:.0f} ms"),
        Row(
            "hard_exit_nobody_leaves",
            asked / plain,
            None,
            "report",
            f"asked after 5 layers, {asked * 1e3:.0f} ms {over}",
        ),
        Row("hard_exit_asked_once", once / plain, None, "report", f"asked after layer 2, {once * 1e3:.0f} ms {over}"),
        Row("hard_exit_all_leave", first / plain, None, "report", f"all leave at layer 1, {first * 1e3:.0f} ms {over}"),
    ]


def _hard(threshold: float, layers: list[int] | None = None) -> Generated:
    options = HardExitDecoding(threshold=threshold, max_length=LENGTH, test_layers=layers)
    return hard_exit(ours(), source(), "mask", options)


@cache
def _fed() -> EncoderDecoder:
    """The same model with a feedback projection."""
    torch.manual_seed(1)
    return ours().grown(CONFIG.model_copy(update={"soft_exit": True})).eval()


@torch.no_grad()
def _check() -> str:
    """Refuses unless transformers' decoder, let look in both directions, and a plain loop write the same."""
    masks = torch.full((1, TOKENS), IDS.mask)
    everything = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    out = theirs("sdpa")(
        input_ids=source().tokens_R[None],
        decoder_input_ids=masks,
        decoder_attention_mask=everything,
        output_hidden_states=True,
    )
    for made in (_hard(0.0), _hard(NEVER_SURE)):
        require(made.tokens[0].tolist() == out.logits[0].argmax(dim=1).tolist(), "all layers must write what theirs do")
        require(made.exits is not None and made.exits.tokens[-1] == TOKENS, "random weights must leave nowhere early")
    shallow = ours().logits(out.decoder_hidden_states[1][0]).argmax(dim=1)
    require(_hard(ALWAYS_SURE).tokens[0].tolist() == shallow.tolist(), "the first layer must write what theirs does")
    made = soft_exit(_fed(), source(), "mask", SoftExitDecoding(max_length=LENGTH))
    require(made.tokens[0].tolist() == _plain_soft(_fed()), "soft exit must write what a plain loop does")
    return f"same {TOKENS} token ids as transformers' decoder without its causal mask"


def _plain_soft(model: EncoderDecoder) -> list[int]:
    tokens = source().tokens_R[None]
    real = torch.ones_like(tokens).bool()
    memory = reference.encode(model, tokens, torch.arange(TOKENS)[None], real)
    x = reference.embed(model, model.decoder, torch.full((1, TOKENS), IDS.mask), torch.arange(TOKENS)[None])
    for number, layer in enumerate(model.decoder.layers):
        assert isinstance(layer, DecoderLayer)
        if number:
            best = model.logits(x[0]).argmax(dim=1)
            x = model.feedback(torch.cat([x, model.shared(best)[None]], dim=2))
        x = reference.decoder_layer(layer, x, x, torch.ones(1, TOKENS, TOKENS).bool(), memory, real)
    return np.asarray(model.logits(x[0]).argmax(dim=1)).tolist()

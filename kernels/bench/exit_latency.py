"""Seconds to write one text all at once, by all layers, by soft exit and by hard exit, on a CPU; see `latency.py`.

Random weights are never sure, so hard exit is shown at its ends: at 0.5 nobody leaves and every off-ramp was asked for
nothing; above ln V everybody leaves at the first layer. `python -m finetune sweep-threshold` shows what lies between
for a trained model.

Shapes: B sources, T tokens of a text.
"""

from functools import cache

import torch
from harness import Row, medians, require
from latency import ATTENTIONS, BASE, REPEATS, SHAPE
from torch.nn import functional as F
from twins import Twins
from writing_checks import Agreed, agree, memory, texts

from finetune.decoding import Generated
from finetune.decoding.hard_exit import HardExitDecoding, hard_exit
from finetune.decoding.soft_exit import SoftExitDecoding, soft_exit
from pretrain.models import EncoderDecoder, SourceRows, reference
from pretrain.models.layers import DecoderLayer

NEVER_SURE, ALWAYS_SURE = 0.5, 11.0  # below any entropy of random weights, and above ln 50,265


def rows() -> list[Row]:
    """`exit_latency`: transformers' greedy search over one pass; the others: a way to exit over one pass without."""
    one = BASE.sources()
    checks = [check_hard(BASE, one, 0.0), check_hard(BASE, one, NEVER_SURE), check_hard(BASE, one, ALWAYS_SURE)]
    check_soft(BASE, one)
    runs = [lambda a=a: BASE.their_beam(one, 1, a) for a in ATTENTIONS]
    ways = [
        lambda: hard(BASE, one, 0.0),
        lambda: soft(BASE, one),
        lambda: hard(BASE, one, NEVER_SURE),
        lambda: hard(BASE, one, NEVER_SURE, [2]),
        lambda: hard(BASE, one, ALWAYS_SURE),
    ]
    *greedy, plain, soft_s, asked, once, first = medians([*runs, *ways], REPEATS)
    theirs_ms, plain_ms = min(greedy) * 1e3, plain * 1e3
    detail = f"transformers greedy {theirs_ms:.0f} ms over {plain_ms:.0f} ms; {checks[0].says}; {SHAPE}"
    over = f"over {plain_ms:.0f} ms of one pass through all layers"
    asked_five = f"asked after 5 layers, {asked * 1e3:.0f} ms {over}"
    asked_once = f"asked after layer 2, {once * 1e3:.0f} ms {over}"
    return [
        Row("exit_latency", min(greedy) / plain, 8.0, "min", detail),
        Row("exit_latency_soft", min(greedy) / soft_s, None, "report", f"soft exit, {soft_s * 1e3:.0f} ms"),
        Row("hard_exit_nobody_leaves", asked / plain, None, "report", asked_five),
        Row("hard_exit_asked_once", once / plain, None, "report", asked_once),
        Row("hard_exit_all_leave", first / plain, None, "report", f"all leave at layer 1, {first * 1e3:.0f} ms {over}"),
    ]


def hard(twins: Twins, source: SourceRows, threshold: float, layers: list[int] | None = None) -> Generated:
    """As many rows as the twins' texts have tokens; BOS has none."""
    options = HardExitDecoding(threshold=threshold, max_length=twins.tokens + 1, test_layers=layers)
    return hard_exit(twins.ours, source, "mask", options)


def soft(twins: Twins, source: SourceRows) -> Generated:
    """The same by soft exit, with a feedback projection."""
    return soft_exit(tuned(twins), source, "mask", SoftExitDecoding(max_length=twins.tokens + 1))


@cache
def tuned(twins: Twins) -> EncoderDecoder:
    """The model with a feedback projection."""
    torch.manual_seed(1)
    return twins.ours.grown(twins.config.model_copy(update={"soft_exit": True})).eval()


@torch.no_grad()
def check_hard(twins: Twins, source: SourceRows, threshold: float, layers: list[int] | None = None) -> Agreed:
    """Hard exit, and transformers' decoder without its causal mask, read where all must leave."""
    made = hard(twins, source, threshold, layers)
    masks_BT = torch.full((source.n_samples, twins.tokens), twins.ids.mask, device=source.tokens_R.device)
    out = twins.their_look(source, masks_BT)
    leaves = 1 if threshold == ALWAYS_SURE else twins.config.decoder_layers
    logits_BTV = twins.ours.logits(out.decoder_hidden_states[leaves].flatten(0, 1)).view(*masks_BT.shape, -1)
    says = agree(texts(made), logits_BTV.argmax(dim=2).tolist(), f"hard exit at {threshold} and layer {leaves}")
    require(made.exits is not None and made.exits.tokens[leaves - 1] == masks_BT.numel(), f"all must leave at {leaves}")
    return Agreed(made.passes, f"{says} as transformers' decoder without its causal mask")


@torch.no_grad()
def check_soft(twins: Twins, source: SourceRows) -> Agreed:
    """Soft exit, and a plain loop over layers by their definition."""
    made, model = soft(twins, source), tuned(twins)
    memory_BSD, real_BS = memory(model, source)
    shape = source.n_samples, twins.tokens
    masks_BT = torch.full(shape, twins.ids.mask, device=real_BS.device)
    everything = torch.ones(*shape, twins.tokens, dtype=torch.bool, device=real_BS.device)
    positions_BT = torch.arange(twins.tokens, device=real_BS.device).expand(shape)
    x_BTD = reference.embed(model, model.decoder, masks_BT, positions_BT)
    for number, layer in enumerate(model.decoder.layers):
        assert isinstance(layer, DecoderLayer)
        if number:
            best_BT = model.logits(x_BTD.flatten(0, 1)).argmax(dim=1).view(shape)
            x_BTD = F.linear(torch.cat([x_BTD, model.shared(best_BT)], dim=2), model.feedback.weight)
        x_BTD = reference.decoder_layer(layer, x_BTD, x_BTD, everything, memory_BSD, real_BS)
    best_BT = model.logits(x_BTD.flatten(0, 1)).argmax(dim=1).view(shape)
    return Agreed(made.passes, f"{agree(texts(made), best_BT.tolist(), 'soft exit and a plain loop')} as a plain loop")

"""Seconds to write one text on a CPU: BART's usual toolkits at beam 5 over our decoders, all with the same weights.

The model has BART-base's shape. `writing.py` shows more ways to write, and batches.
"""

import sys
from collections.abc import Callable
from functools import partial

from harness import Row, medians
from twins import Twins
from writing_checks import check_beam, check_ct2, check_pass

from pretrain.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=50_265, d_model=768, encoder_layers=6, decoder_layers=6, heads=12, ffn_dim=3072, logits_bias=True
)
BEAM, TOKENS, REPEATS = 5, 64, 5
# Of the peer's implementations of attention the faster one counts.
ATTENTIONS = ("sdpa", "eager")
SHAPE = f"BART-base, batch 1, source {TOKENS}, {TOKENS} new tokens"
BASE = Twins(CONFIG, TOKENS, TOKENS)


def nar_row() -> Row:
    """transformers left to right over our one pass."""
    one = BASE.sources()
    agreed = check_pass(BASE, one, iterations=0).says
    *beams, one_pass = medians([*_their_beams(), lambda: BASE.our_pass(one)], REPEATS)
    detail = f"{_peer(beams)} over {one_pass * 1e3:.0f} ms; {agreed}; {SHAPE}"
    return Row("nar_latency", min(beams) / one_pass, 12.0, "min", detail)


def ar_row() -> Row:
    """transformers left to right over our beam."""
    one = BASE.sources()
    agreed, _ = [check_beam(BASE, one, BEAM, attention)[0].says for attention in ATTENTIONS]
    *beams, beam = medians([*_their_beams(), lambda: BASE.our_beam(one, BEAM)], REPEATS)
    detail = f"{_peer(beams)} over {beam * 1e3:.0f} ms; {agreed}; {SHAPE}"
    return Row("ar_latency", min(beams) / beam, 1.0, "min", detail)


def ct2_rows() -> list[Row]:
    """CTranslate2 left to right over our one pass; no row where CTranslate2 is not installed."""
    if BASE.translator is None:
        print("ct2_latency is left out: ctranslate2 is not installed", file=sys.stderr, flush=True)
        return []
    one = BASE.sources()
    agreed = check_ct2(BASE, one, beam=1).says
    beam, one_pass = medians([lambda: BASE.ct2_words(one, BEAM), lambda: BASE.our_pass(one)], REPEATS)
    detail = f"CTranslate2 fp32 {beam * 1e3:.0f} ms over {one_pass * 1e3:.0f} ms; {agreed}; {SHAPE}"
    return [Row("ct2_latency", beam / one_pass, None, "report", detail)]


def _their_beams() -> list[Callable[[], object]]:
    one = BASE.sources()
    return [partial(BASE.their_beam, one, BEAM, attention) for attention in ATTENTIONS]


def _peer(seconds: list[float]) -> str:
    each = " and ".join(f"{name} {s * 1e3:.0f} ms" for name, s in zip(ATTENTIONS, seconds, strict=True))
    return f"transformers beam {BEAM}, {each}: the faster"

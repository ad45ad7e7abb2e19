"""Row 9: milliseconds to write 64 tokens at batch 1, left to right by transformers over our one pass.

Tokens are compared in fp32 on the device; then the same models are timed in bf16.
"""

from collections.abc import Iterator

import torch
from gpu_harness import Bench
from harness import Row
from latency import ATTENTIONS, CONFIG
from twins import Twins
from writing_checks import check_beam, check_pass

SMALL = {"vocab_size": 300, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn_dim": 32}
ITERATIONS = (4, 10)
GRAPHED = "9 own AR under CUDA graphs / ours"


def rows(bench: Bench) -> Iterator[Row]:
    """Greedy search counts; beam 5 is told, too."""
    config = CONFIG.model_copy(update=SMALL) if bench.small else CONFIG
    tokens, source = (8, 8) if bench.small else (64, 512)
    twins = Twins(config, tokens, source, bench.device.type)
    one = twins.sources()
    says = [check_pass(twins, one, iterations=0).says]
    says += [check_beam(twins, one, beam)[0].says for beam in (1, 5)]
    twins.ours.to(bench.dtype)
    for attention in ATTENTIONS:
        twins.theirs(attention).to(bench.dtype)
    greedy = [lambda a=a: twins.their_beam(one, 1, a) for a in ATTENTIONS]
    beams = [lambda a=a: twins.their_beam(one, 5, a) for a in ATTENTIONS]
    ours = [lambda: twins.our_pass(one), lambda: twins.our_beam(one, 1)]
    refined = [lambda n=n: twins.our_pass(one, n) for n in ITERATIONS]
    with torch.no_grad():
        times = bench.times([*greedy, *beams, *ours, *refined])
    taken = times.milliseconds
    one_pass, ar = 2 * len(ATTENTIONS), 2 * len(ATTENTIONS) + 1
    fastest = min(range(len(ATTENTIONS)), key=lambda i: taken[i])
    beam = len(ATTENTIONS) + min(range(len(ATTENTIONS)), key=lambda i: taken[len(ATTENTIONS) + i])
    shape = f"BART-base, batch 1, source {source}, {tokens} tokens, bf16; in fp32 {', '.join(says)}"
    told = f"attention {ATTENTIONS[fastest]}, the faster; {shape}"
    yield times.ratio("9 transformers generate, greedy / our NAR pass", fastest, one_pass, 50.0, True, told)
    yield times.ratio("9 transformers generate, beam 5 / our NAR pass", beam, one_pass, None, True, shape)
    yield times.ratio("9 own AR without graphs / our NAR pass", ar, one_pass, None, True, shape)
    for index, count in enumerate(ITERATIONS):
        name = f"9 our NAR of {count} iterations / our NAR pass"
        yield times.ratio(name, ar + 1 + index, one_pass, None, False, shape)
    bench.skip(GRAPHED, "left-to-right writing under CUDA graphs is not there yet")

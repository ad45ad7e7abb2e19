"""Row 9: milliseconds to write 64 tokens at batch 1, left to right by transformers over our one pass.

Tokens are compared in fp32 on the device; then the same models are timed in bf16.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from gpu_harness import Bench
from harness import Row, require
from latency import ATTENTIONS, CONFIG
from twins import Twins
from writing_checks import check_beam, check_pass

from finetune.decoding import Generated
from pretrain.models import SourceRows

Writes = Callable[[SourceRows], Generated]

SMALL = {"vocab_size": 300, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn_dim": 32}
ITERATIONS = (4, 10)


def rows(bench: Bench) -> Iterator[Row]:
    """Greedy search counts; beam 5 is told, too."""
    config = CONFIG.model_copy(update=SMALL) if bench.small else CONFIG
    tokens, source = (8, 8) if bench.small else (64, 512)
    twins = Twins(config, tokens, source, bench.device.type)
    one = twins.sources()
    says = [check_pass(twins, one, iterations=0).says]
    says += [check_beam(twins, one, beam)[0].says for beam in (1, 5)]
    for by_graphs, plain_writes in ((twins.graphed_pass(), twins.our_pass), (twins.graphed_beam(1), _greedy(twins))):
        for _ in range(3):  # as it is, recorded, replayed
            check_same(by_graphs(one), plain_writes(one))
    twins.ours.to(bench.dtype)
    for attention in ATTENTIONS:
        twins.theirs(attention).to(bench.dtype)
    greedy = [lambda a=a: twins.their_beam(one, 1, a) for a in ATTENTIONS]
    beams = [lambda a=a: twins.their_beam(one, 5, a) for a in ATTENTIONS]
    # By CUDA graphs, which record a shape when it comes the second time.
    graphed: list[Writes] = [
        twins.graphed_pass(),
        twins.graphed_beam(1),
        *(twins.graphed_pass(count) for count in ITERATIONS),
    ]
    eager = [partial(twins.our_pass, one), partial(twins.our_beam, one, 1)]
    with torch.no_grad():
        for write in [*graphed, *graphed]:
            write(one)
        times = bench.times([*greedy, *beams, *(partial(write, one) for write in graphed), *eager])
    taken = times.milliseconds
    one_pass, ar = 2 * len(ATTENTIONS), 2 * len(ATTENTIONS) + 1
    refined, plain = ar + 1, ar + 1 + len(ITERATIONS)
    fastest = min(range(len(ATTENTIONS)), key=lambda i: taken[i])
    beam = len(ATTENTIONS) + min(range(len(ATTENTIONS)), key=lambda i: taken[len(ATTENTIONS) + i])
    shape = f"BART-base, batch 1, source {source}, {tokens} tokens, bf16; in fp32 {', '.join(says)}"
    told = f"attention {ATTENTIONS[fastest]}, the faster; {shape}"
    yield times.ratio("9 transformers generate, greedy / our NAR pass", fastest, one_pass, 50.0, True, told)
    yield times.ratio("9 transformers generate, beam 5 / our NAR pass", beam, one_pass, None, True, shape)
    yield times.ratio("9 own AR under CUDA graphs / our NAR pass", ar, one_pass, 12.0, True, shape)
    for index, count in enumerate(ITERATIONS):
        name = f"9 our NAR of {count} iterations / our NAR pass"
        yield times.ratio(name, refined + index, one_pass, None, False, shape)
    yield times.ratio("9 our NAR pass without graphs / with them", plain, one_pass, None, True, shape)
    yield times.ratio("9 own AR without graphs / with them", plain + 1, ar, None, True, shape)


def _greedy(twins: Twins) -> Writes:
    return partial(twins.our_beam, beam=1)


def check_same(by_graphs: Generated, plain: Generated) -> None:
    """Refuses unless the tokens are equal."""
    pairs = zip(by_graphs.tokens, plain.tokens, strict=True)
    require(all(np.array_equal(a, b) for a, b in pairs), "tokens by graphs must be those without")

"""Row 9, continued: milliseconds to write one text by hard and soft exit, over one pass through all layers.

Random weights are never sure, so hard exit is shown at its ends, as in `exit_latency.py`. Texts by CUDA graphs are held
against those without in fp32; then the same model is timed in bf16.
"""

from collections.abc import Iterator
from functools import partial

import torch
from exit_latency import ALWAYS_SURE, NEVER_SURE, check_hard, check_soft, hard, soft, tuned
from gpu_harness import Bench
from gpu_latency import SMALL, check_same
from harness import Row
from latency import CONFIG
from twins import Twins

from finetune.decoding.hard_exit import HardExitDecoding
from finetune.decoding.hard_exit_static import StaticHardExit
from finetune.decoding.soft_exit import SoftExitDecoding
from finetune.decoding.soft_exit_static import StaticSoftExit


def rows(bench: Bench) -> Iterator[Row]:
    """By CUDA graphs; what they gain is told, too."""
    config = CONFIG.model_copy(update={**SMALL, "decoder_layers": 2}) if bench.small else CONFIG
    tokens, source = (8, 8) if bench.small else (64, 512)
    twins = Twins(config, tokens, source, bench.device.type)
    one = twins.sources()
    thresholds = (0.0, NEVER_SURE, ALWAYS_SURE)
    says = [check_hard(twins, one, threshold).says for threshold in thresholds]
    check_soft(twins, one)
    eager = [*(partial(hard, twins, one, threshold) for threshold in thresholds), partial(soft, twins, one)]
    for graphed, plain in zip(_graphed(twins), eager, strict=True):
        for _ in range(3):  # as it is, recorded, replayed
            check_same(graphed(one), plain())
    twins.ours.to(bench.dtype)
    tuned(twins).to(bench.dtype)
    graphs = [partial(write, one) for write in _graphed(twins)]
    with torch.no_grad():
        for write in [*graphs, *graphs]:
            write()
        times = bench.times([*graphs, *eager])
    shape = f"BART-base, batch 1, source {source}, {tokens} tokens, bf16; in fp32 {', '.join(says)}"
    yield times.ratio("9 hard exit, nobody leaves / all layers", 1, 0, None, False, shape)
    yield times.ratio("9 hard exit, all leave at layer 1 / all layers", 2, 0, None, False, shape)
    yield times.ratio("9 soft exit / all layers", 3, 0, None, False, shape)
    names = ("all layers", "hard exit, nobody leaves", "hard exit, all leave at layer 1", "soft exit")
    for number, name in enumerate(names):
        yield times.ratio(f"9 {name}: without graphs / with them", len(graphs) + number, number, None, True, shape)


def _graphed(twins: Twins) -> list[StaticHardExit | StaticSoftExit]:
    """By CUDA graphs of the models as they are now."""
    longest = twins.tokens + 1
    exits = [HardExitDecoding(threshold=given, max_length=longest) for given in (0.0, NEVER_SURE, ALWAYS_SURE)]
    by_hard = [StaticHardExit(twins.ours, "mask", options) for options in exits]
    return [*by_hard, StaticSoftExit(tuned(twins), "mask", SoftExitDecoding(max_length=longest))]

"""Row 8: statistics of an off-ramp over a chain of PyTorch, and over the product that makes its logits."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_harness import Bench
from harness import Row, require
from torch import Tensor
from torch.nn import functional as F

from parlance_kernels import exit_copy, offramp_stats
from parlance_kernels.exit_copy.reference import exit_copy_reference

BANNED = (0, 1, 3)


def rows(bench: Bench) -> Iterator[Row]:
    """At 2,048 rows, and at the 64 of one text; then what a state costs that leaves."""
    vocabulary, width = (301, 16) if bench.small else (50_265, 768)
    weight_VD = bench.randn(vocabulary, width, seed=1, scale=0.05)
    for count, target in ((16, None), (8, None)) if bench.small else ((2048, 1.1), (64, None)):
        h_LD = bench.randn(count, width, seed=2)
        logits_LV = F.linear(h_LD, weight_VD)
        says = _check(bench, logits_LV)

        product = partial(F.linear, h_LD, weight_VD)
        times = bench.times(
            [
                partial(chain, logits_LV),
                partial(offramp_stats, logits_LV, BANNED, backend=bench.backend),
                partial(_offramp, product, bench.backend),
                product,
            ],
            ahead=True,
        )
        shape = f"{count} rows, V={vocabulary}, d={width}, bf16; {says}"
        least = 2.5 if target else None
        yield times.ratio(f"8 torch chain / off-ramp statistics, {count} rows", 0, 1, least, True, shape)
        yield times.ratio(f"8 off-ramp / its product alone, {count} rows", 2, 3, target, False, shape)
    yield _copies(bench)


def _offramp(product: Callable[[], Tensor], backend: str) -> object:
    return offramp_stats(product(), BANNED, backend=backend)


def chain(logits_LV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, best token and its log-probability as one writes them in PyTorch."""
    logp_LV = logits_LV.float().log_softmax(dim=1)
    entropy_L = -(logp_LV.exp() * logp_LV).sum(dim=1)
    logp_LV[:, list(BANNED)] = -torch.inf
    best = logp_LV.max(dim=1)
    return entropy_L, best.indices, best.values


def _check(bench: Bench, logits_LV: Tensor) -> str:
    found = offramp_stats(logits_LV, BANNED, backend=bench.backend)
    entropy_L, token_L, log_p_L = chain(logits_LV.double())
    off = max(float((a - b).abs().max()) for a, b in ((found.entropy_L, entropy_L), (found.log_p_L, log_p_L)))
    require(off < 1e-4, f"entropy and log-probability must agree to 1e-4, got {off:.1e}")
    best_L = logits_LV.gather(1, token_L[:, None]) == logits_LV.gather(1, found.token_L[:, None])
    require(bool(best_L.all()), "the best tokens must be the same, ties aside")
    return f"entropies agree to {off:.1e}"


def _copies(bench: Bench) -> Row:
    """Half of the rows leave; forward and backward."""
    count, width = (12, 16) if bench.small else (16_384, 768)
    table_UD, out_AD = bench.randn(count, width, seed=3), bench.randn(count // 2, width, seed=4)
    order_A = torch.randperm(count // 2, generator=torch.Generator().manual_seed(0)).to(bench.device)
    left_N, stays_S = order_A[: count // 4].sort().values, order_A[count // 4 :].sort().values

    def run(function: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        given = [x.detach().requires_grad_() for x in (table_UD, out_AD)]
        made = function(given[0], count // 2, given[1], left_N, stays_S, False)
        return (*(x.detach() for x in made), *torch.autograd.grad(made, given, [x.detach() for x in made]))

    ours, theirs = (partial(exit_copy, backend=backend) for backend in (bench.backend, "torch"))
    small = (
        table_UD[:8],
        4,
        out_AD[:6],
        torch.tensor([0, 3], device=bench.device),
        torch.tensor([1], device=bench.device),
    )
    for a, b in zip(ours(*small, False), exit_copy_reference(*small, False), strict=True):
        require(torch.equal(a, b), "exit_copy must copy")
    pairs = zip(run(ours), run(theirs), strict=True)
    require(all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in pairs), "gradients of copies must agree")
    times = bench.times([lambda: run(theirs), lambda: run(ours)], ahead=True)
    return times.ratio("exit_copy: torch / ours", 0, 1, None, True, f"{count} states of {width}, forward and backward")

"""Row 7: the vocabulary loss of triplets and AR rows over the log-softmax chain, and over its products alone."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_harness import Bench, CannotRun, as_good
from harness import Row
from torch import Tensor

from parlance_kernels import vocab_loss
from parlance_kernels.vocab_loss import cuda
from parlance_kernels.vocab_loss.reference import vocab_loss_reference

TERMS: dict[str, Any] = {
    "ce_scale": (1e-3, 2e-3, 3e-3),
    "kl_pairs": ((0, 2), (1, 2), (0, 1)),
    "kl_scale": (4e-3, 5e-3, 6e-3),
    "label_smoothing": 0.1,
}
CHUNKS, THREADS = (2048, 4096, 8192), (128, 256, 512)


def rows(bench: Bench) -> Iterator[Row]:
    """BART's vocabulary, which is odd, and base width. The check is on fewer rows than the time."""
    vocabulary, width, triplets, checked = (101, 16, 6, 3) if bench.small else (50_265, 768, 4096, 256)
    few, all_rows = _Case(bench, vocabulary, width, checked), _Case(bench, vocabulary, width, triplets)
    says = as_good("vocab_loss", few.run(few.low), few.chain(few.low), few.chain(few.exact))
    n = 4 * triplets
    detail = f"V={vocabulary}, d={width}, {triplets} triplets + {triplets} AR rows, bf16; {says}"
    times = bench.times(
        [lambda: all_rows.chain(all_rows.low), lambda: all_rows.run(all_rows.low), all_rows.products], ahead=True
    )
    yield times.ratio("7 torch chain / vocab_loss", 0, 1, 3.0, True, detail)
    yield times.ratio("7 vocab_loss / its products alone", 1, 2, 1.2, False, detail)
    try:
        chain, ours = (bench.peak_bytes(partial(f, all_rows.low)) for f in (all_rows.chain, all_rows.run))
        told = f"{chain / 1e6:.0f} MB over {ours / 1e6:.0f} MB above the inputs, gradients included; {detail}"
        yield Row("7 extra memory: torch chain / vocab_loss", chain / ours, 8.0, "min", told)
    except CannotRun as why:
        bench.skip("7 extra memory: torch chain / vocab_loss", why)
    for chunk in CHUNKS:
        times = bench.times([partial(all_rows.run, all_rows.low, chunk), all_rows.products], repeats=15, ahead=True)
        yield times.ratio(f"7 with chunks of {chunk} rows / products alone", 0, 1, None, False, f"{n} rows")
    kept = cuda.THREADS
    try:
        for threads in THREADS:
            cuda.THREADS = threads
            times = bench.times([lambda: all_rows.run(all_rows.low), all_rows.products], repeats=15, ahead=True)
            yield times.ratio(f"7 with blocks of {threads} threads / products alone", 0, 1, None, False, f"{n} rows")
    finally:
        cuda.THREADS = kept


class _Case:
    """Random states and weights, each AR row beside the NAR and the AUX row of the same token."""

    def __init__(self, bench: Bench, vocabulary: int, width: int, triplets: int) -> None:
        self.bench, count = bench, 4 * triplets
        make = torch.Generator().manual_seed(0)
        h_RD, weight_VD = bench.randn(count, width), bench.randn(vocabulary, width, seed=1, scale=0.05)
        self.low = h_RD.requires_grad_(), weight_VD.requires_grad_()
        self.exact = tuple(x.detach().float().requires_grad_() for x in self.low)
        order = torch.arange(triplets)
        index = {
            "target_R": torch.randint(vocabulary, (count,), generator=make),
            "term_R": torch.tensor([0, 0, 1, 2]).repeat_interleave(triplets),
            "tuple_PK": torch.stack([order, order + 2 * triplets, order + 3 * triplets], dim=1),
        }
        self.index: dict[str, Any] = {name: x.to(bench.device) for name, x in index.items()}

    def run(self, given: tuple[Tensor, ...], chunk: int | None = None) -> tuple[Tensor, ...]:
        """Loss and gradients by the operator."""
        total = vocab_loss(given[0], given[1], **self.index, **TERMS, chunk_rows=chunk, backend=self.bench.backend)[0]
        return (total.detach(), *torch.autograd.grad(total, given))

    def chain(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same by its definition."""
        total = vocab_loss_reference(given[0], given[1], **self.index, **TERMS)[0]
        return (total.detach(), *torch.autograd.grad(total, given))

    @torch.no_grad()
    def products(self) -> Tensor:
        """Logits and both gradients of chunks as large as the operator's, of padded length, and nothing between."""
        h_RD, weight_WD = self.low[0], cuda._padded(self.low[1])
        dweight_WD = torch.zeros_like(weight_WD, dtype=torch.float32)
        for h_ND in h_RD.split(cuda.CHUNK_ROWS):
            logits_NW = h_ND @ weight_WD.T
            _ = logits_NW @ weight_WD
            cuda._add_product(dweight_WD, logits_NW, h_ND, 1.0)
        return dweight_WD

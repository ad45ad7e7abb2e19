"""The fused vocabulary loss over the plain log-softmax chain, BART's vocabulary: time and extra peak memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from harness import Row, medians, require
from torch import Tensor

from parlance_kernels import vocab_loss
from parlance_kernels.vocab_loss.reference import vocab_loss_reference

VOCAB, WIDTH, TRIPLETS, PLAIN, REPEATS = 50_265, 768, 384, 384, 3
TERMS = {
    "ce_scale": (1e-3, 2e-3, 3e-3),
    "kl_pairs": ((0, 2), (1, 2), (0, 1)),
    "kl_scale": (4e-3, 5e-3, 6e-3),
    "label_smoothing": 0.1,
}
LOSSES: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {"chain": vocab_loss_reference, "fused": vocab_loss}


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, weight, target, term, tuples: triplets (AR, NAR, AUX) and AR rows without partners."""
    torch.manual_seed(0)
    rows = 3 * TRIPLETS + PLAIN
    h_RD = torch.randn(rows, WIDTH).requires_grad_()
    weight_VD = torch.randn(VOCAB, WIDTH).mul_(0.05).requires_grad_()  # in place: the peak counts
    term_R = torch.zeros(rows, dtype=torch.int64)
    term_R[TRIPLETS + PLAIN :] = torch.arange(2).repeat_interleave(TRIPLETS) + 1
    order = torch.arange(TRIPLETS)
    tuples_PK = torch.stack([order, order + TRIPLETS + PLAIN, order + 2 * TRIPLETS + PLAIN], dim=1)
    return h_RD, weight_VD, torch.randint(VOCAB, (rows,)), term_R, tuples_PK


def run(name: str, given: tuple[Tensor, ...]) -> Tensor:
    """Loss and gradients by one of the two implementations."""
    given[0].grad = given[1].grad = None
    total = LOSSES[name](*given, **TERMS)[0]
    total.backward()
    return total.detach()


def rows() -> list[Row]:
    """`vocab_loss_time` and `vocab_loss_memory`; the memory of each side is taken in a process of its own."""
    given = inputs()
    losses, grads = {}, {}
    for name in LOSSES:
        losses[name] = run(name, given)
        grads[name] = [x.grad.clone() for x in given[:2] if x.grad is not None]
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(grads["fused"], grads["chain"], strict=True))
    require(off <= 1e-5, f"vocabulary loss gradients must agree to 1e-5, got {off:.1e}")
    require(abs(float(losses["fused"] / losses["chain"]) - 1) < 1e-5, f"losses must agree, got {losses}")
    chain, fused = medians([lambda: run("chain", given), lambda: run("fused", given)], REPEATS)
    extra = {name: _extra_memory(name) for name in LOSSES}
    shape = f"V={VOCAB}, d={WIDTH}, {TRIPLETS} triplets + {PLAIN} AR rows; gradients agree to {off:.1e}"
    time_detail = f"{chain:.2f} s over {fused:.2f} s; {shape}"
    memory_detail = f"{extra['chain'] / 1e6:.0f} MB over {extra['fused'] / 1e6:.0f} MB; {shape}"
    return [
        Row("vocab_loss_time", chain / fused, 2.0, "min", time_detail),
        Row("vocab_loss_memory", extra["chain"] / extra["fused"], 6.0, "min", memory_detail),
    ]


def _extra_memory(name: str) -> int:
    """Bytes by which one step raises the peak of a fresh process above its inputs and their gradients."""
    done = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout))


def _measure(name: str) -> None:
    given = inputs()
    before = psutil.Process().memory_info().rss
    LOSSES[name](*given, **TERMS)[0].backward()
    gradients = sum(x.grad.nbytes for x in given[:2] if x.grad is not None)
    sys.stdout.write(json.dumps(_peak() - before - gradients))


def _peak() -> int:
    """Peak resident bytes of this process alone; getrusage would carry over the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    _measure(sys.argv[1])

"""Operators over a vocabulary that ranks have parts of: what each returns is what the whole vocabulary gives.

R rows, D width, V vocabulary: 11 tokens, which three ranks have as 4, 4 and 3.
"""

from typing import Any

import pytest
import torch
from torch import distributed as dist

from parlance_kernels import VocabPart, offramp_stats, vocab_loss
from pretrain.distributed import World
from tests.distributed_helper import run_ranks

ROWS, WIDTH, VOCAB = 9, 5, 11
LOSS: dict[str, Any] = {
    "target_R": torch.tensor([0, 3, 4, 7, 8, 10, 10, 2, 5]),
    "term_R": torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0]),
    "tuple_PK": torch.tensor([[0, 1, 2], [3, 4, 5]]),
    "ce_scale": [0.5, 1.0, 0.25],
    "kl_pairs": [(0, 2), (1, 2)],
    "kl_scale": [2.0, 0.5],
    "label_smoothing": 0.1,
    "chunk_rows": 4,
    "backend": "torch",
}


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    h_RD, weight_VD, bias_V = (torch.randn(*shape, generator=draw).double() for shape in ((9, 5), (11, 5), (11,)))
    return h_RD.requires_grad_(), weight_VD.requires_grad_(), bias_V.requires_grad_()


def logits() -> torch.Tensor:
    """Rows with an equal best in two parts, with a part that is hardly possible, and with all weight on one token."""
    logits_RV = 3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits_RV[0, [2, 9]] = 50.0
    logits_RV[1, 4:7] = -torch.inf
    logits_RV[1, 7] = -800.0
    logits_RV[2] = -900.0
    logits_RV[2, 5] = 1.0
    return logits_RV


def over_parts(world: World) -> dict[str, Any]:
    each = -(-VOCAB // world.size)
    size = min(each, VOCAB - world.rank * each)
    group: Any = dist.group.WORLD
    part = VocabPart(world.rank * each, size, VOCAB, group)
    mine = slice(part.start, part.start + size)
    h_RD, weight_VD, bias_V = tensors()
    total, ce_T, kl_Q = vocab_loss(h_RD, weight_VD[mine], bias_V=bias_V[mine], part=part, **LOSS)
    (3 * total).backward()
    stats = [offramp_stats(logits()[:, mine], banned, part=part, backend="torch") for banned in ((), (2, 5, 9))]
    return {
        "loss": [value.detach().tolist() for value in (total, ce_T, kl_Q)],
        "dh": h_RD.grad.tolist(),
        "dweight": weight_VD.grad.tolist(),
        "dbias": bias_V.grad.tolist(),
        "stats": [[value.tolist() for value in one] for one in stats],
        "joined": part.joined(logits()[:, mine]).tolist(),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(over_parts, 3)


def test_the_loss_and_its_gradients_are_those_of_the_whole_vocabulary(ranks: list[dict[str, Any]]) -> None:
    h_RD, weight_VD, bias_V = tensors()
    made = vocab_loss(h_RD, weight_VD, bias_V=bias_V, **LOSS)
    (3 * made[0]).backward()
    near = {"rtol": 1e-12, "atol": 1e-13}
    for rank in ranks:
        for found, wanted in zip(rank["loss"], made, strict=True):
            torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted.detach(), **near)
        torch.testing.assert_close(torch.tensor(rank["dh"], dtype=torch.float64), h_RD.grad, **near)
    for name, wanted in (("dweight", weight_VD.grad), ("dbias", bias_V.grad)):
        found = sum(torch.tensor(rank[name], dtype=torch.float64) for rank in ranks)  # each has zeros elsewhere
        torch.testing.assert_close(found, wanted, **near)


def test_what_an_off_ramp_says_is_what_it_says_of_the_whole_vocabulary(ranks: list[dict[str, Any]]) -> None:
    for index, banned in enumerate(((), (2, 5, 9))):
        wanted = offramp_stats(logits(), banned, backend="torch")
        for rank in ranks:
            for name, found, value in zip(wanted._fields, rank["stats"][index], wanted, strict=True):
                torch.testing.assert_close(
                    torch.tensor(found, dtype=value.dtype),
                    value,
                    rtol=1e-12,
                    atol=1e-12,
                    msg=lambda m, n=name: f"{n}: {m}",
                )
    for rank in ranks:
        assert torch.equal(torch.tensor(rank["joined"], dtype=torch.float64), logits())

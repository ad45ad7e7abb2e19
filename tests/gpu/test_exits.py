"""`exit_copy`, `compact_rows` and `offramp_stats` with their kernels equal their definitions."""

import pytest
import torch

from parlance_kernels import exit_copy, offramp_stats
from parlance_kernels.exit_copy.active_rows import compact_rows, gather_rows, scatter_rows_
from parlance_kernels.exit_copy.reference import exit_copy_reference
from parlance_kernels.offramp_stats.reference import offramp_stats_reference
from tests.gpu.cases import indices, states

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "frozen", "width"), [(0, 0, 8), (1, 1, 1), (37, 12, 7), (300, 40, 768)])
def test_exit_copy(device, n, frozen, width, dtype, detach):
    table, out = states((n, width), dtype, device, 0), states((n, width), dtype, device, 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    left, stays = indices(device, order[: n // 3].sort().values, order[n // 4 :].sort().values)
    found = []
    for copy, given in (
        (lambda *x: exit_copy(*x, backend="cuda"), (table, out)),
        (exit_copy_reference, (table.double(), out.double())),
    ):
        given = [x.requires_grad_() for x in given]
        next_, left_ = copy(given[0], frozen, given[1], left, stays, detach)
        weight = states(next_.shape, torch.float32, device, 2).to(dtype).to(next_.dtype)
        total = (next_ * weight).sum() + (left_ * weight[: len(left_)]).sum() + 0.0 * (given[0].sum() + given[1].sum())
        found.append([next_.detach(), left_.detach(), *torch.autograd.grad(total, given)])
    # The kernel adds up to three numbers and rounds once; PyTorch rounds after each.
    allowed = 0.04 if device.type == "cpu" and dtype != torch.float32 else 1e-6
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right.to(dtype), rtol=1e-6 if dtype == torch.float32 else 0, atol=allowed)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [0, 1, 31, 1024, 5000, 65_536])
def test_rows_are_compacted_gathered_and_put_back(device, n, share):
    active = (torch.rand(n, generator=torch.Generator().manual_seed(n)) < share).to(device)
    rows, count = compact_rows(active, backend="cuda")
    for ours, right in zip((rows, count), compact_rows(active, backend="torch"), strict=True):
        assert torch.equal(ours, right)
    x = states((n, 24), torch.bfloat16, device, 3)
    gathered = gather_rows(x, rows, count, backend="cuda")
    assert torch.equal(gathered, gather_rows(x, rows, count, backend="torch"))
    back = torch.zeros_like(x)
    scatter_rows_(back, rows, count, gathered, backend="cuda")
    assert torch.equal(back, torch.where(active[:, None], x, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 5), (3, 1), (5, 7), (4, 1003), (3, 50_265)])
def test_offramp_stats(device, rows, vocabulary, dtype):
    logits = states((rows, vocabulary), dtype, device, rows, 4.0)
    banned = [0, vocabulary - 1] if vocabulary > 2 else []
    found = offramp_stats(logits, banned, backend="cuda")
    exact = offramp_stats(logits.double(), banned, backend="torch")
    if rows and vocabulary < 2000:
        for a, b in zip(exact, offramp_stats_reference(logits.double().cpu(), banned), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9)
    for ours, right in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, right.to(ours.dtype), rtol=1e-5, atol=2e-5)


def test_a_row_that_is_no_number_is_never_sure(device):
    logits = states((2, 500), torch.float32, device, 0)
    logits[1, 77] = torch.nan
    assert offramp_stats(logits, backend="cuda").entropy_L.isnan().tolist() == [False, True]

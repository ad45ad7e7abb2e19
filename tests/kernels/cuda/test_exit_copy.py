"""The kernels of `exit_copy` on the emulator equal its definition, gradients included; its operators are sound."""

import pytest
import torch

from parlance_kernels import backend, exit_copy
from parlance_kernels.exit_copy import active_rows, cuda
from parlance_kernels.exit_copy.reference import exit_copy_reference
from tests.kernels.cuda.emulation import emulated, guarded, untouched

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CASES = [  # states, frozen, computed, left, stays, width
    (5, 2, 7, [0, 3, 4], [1, 3, 6], 24),  # row 3 both leaves and stays, 2 and 5 do neither
    (9, 0, 9, [], list(range(9)), 96),
    (3, 3, 4, [3, 0], [], 7),
    (1, 0, 1, [0], [0], 1),
    (2, 1, 0, [], [], 5),
    (0, 0, 3, [2], [1, 0], 16),
    (40, 17, 33, list(range(0, 33, 2)), list(range(1, 33, 2)), 100),
]


def given(case, dtype, seed=0):
    states, frozen, computed, left, stays, width = case
    generator = torch.Generator().manual_seed(seed)
    table, out = (torch.randn(n, width, generator=generator).to(dtype) for n in (states, computed))
    return table, frozen, out, torch.tensor(left, dtype=torch.int64), torch.tensor(stays, dtype=torch.int64)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [HALF, BF16, FP32])
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype, reverse):
    table, frozen, out, left, stays = given(case, dtype)
    expected = exit_copy_reference(table, frozen, out, left, stays, False)
    for offset in (0, 1):
        table_, out_ = guarded(table, offset)[0], guarded(out, offset)[0]
        with emulated(reverse):
            found = cuda.copy_cuda(table_, frozen, out_, left, stays, False)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def exact_gradients(case, detach, d_next, d_left):
    table, frozen, out, left, stays = given(case, torch.float64)
    table.requires_grad_(), out.requires_grad_()
    next_, left_ = exit_copy_reference(table, frozen, out, left, stays, detach)
    total = (next_ * d_next.double()).sum() + (left_ * d_left.double()).sum() + 0.0 * (table.sum() + out.sum())
    return torch.autograd.grad(total, (table, out))


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("dtype", [HALF, BF16, FP32])
@pytest.mark.parametrize("case", CASES)
def test_backward(case, dtype, detach):
    states, frozen, computed, left, stays, width = case
    generator = torch.Generator().manual_seed(1)
    rows = frozen + len(left) + len(stays), len(left)
    d_next, d_left = (torch.randn(n, width, generator=generator).to(dtype) for n in rows)
    sizes = states, computed, frozen, detach
    exact = exact_gradients(case, detach, d_next, d_left)
    arguments = d_next, d_left, *(torch.tensor(x, dtype=torch.int64) for x in (left, stays)), *sizes
    with emulated(reverse=detach):
        found = cuda.backward_cuda(*arguments)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=2e-7 if dtype == FP32 else 0, atol=1e-7)
    for ours, theirs in zip(
        cuda.backward_torch(*(x.double() if i < 2 else x for i, x in enumerate(arguments))), exact, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_nothing_is_written_beside_the_results(monkeypatch):
    table, frozen, out, left, stays = given(CASES[0], BF16)
    made = [guarded(x) for x in cuda._copy_like(table, frozen, out, left, stays, False)]
    monkeypatch.setattr(cuda, "_copy_like", lambda *_: tuple(x for x, _ in made))
    with emulated():
        cuda.copy_cuda(table, frozen, out, left, stays, False)
    assert all(untouched(around) for _, around in made)
    assert not any(x.isnan().any() for x, _ in made)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 1000, 1024, 1025, 5000, 65536])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_compaction(n, share, reverse):
    active, around = guarded(
        (torch.rand(n, generator=torch.Generator().manual_seed(n)) < share).to(torch.uint8).view(torch.int8)
    )
    active = active.view(torch.bool)
    with emulated(reverse):
        rows, count = active_rows.compact_cuda(active)
    expected = [i for i, x in enumerate(active.tolist()) if x] + [i for i, x in enumerate(active.tolist()) if not x]
    assert rows.tolist() == expected
    assert count.tolist() == [int(active.sum())]
    assert untouched(around)
    torch.testing.assert_close(active_rows.compact_rows(active, backend="torch"), (rows, count))


@pytest.mark.parametrize(("n", "width", "dtype"), [(13, 24, BF16), (8, 7, HALF), (9, 3, FP32), (0, 4, FP32)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rows_are_gathered_and_put_back(n, width, dtype, share):
    generator = torch.Generator().manual_seed(n)
    x, active = torch.randn(n, width, generator=generator).to(dtype), torch.rand(n, generator=generator) < share
    rows, count = active_rows.compact_rows(active, backend="torch")
    with emulated():
        gathered = active_rows.gather_cuda(x, rows, count)
    torch.testing.assert_close(gathered[: int(count)], x[active], rtol=0, atol=0)
    assert not gathered[int(count) :].any()
    torch.testing.assert_close(gathered, active_rows.gather_rows(x, rows, count, backend="torch"), rtol=0, atol=0)
    expected = torch.where(active[:, None], -x, x)
    poisoned = torch.where((torch.arange(n) < count)[:, None], -gathered, torch.nan)
    inside, around = guarded(x)
    with emulated():
        active_rows.scatter_cuda(inside, rows, count, poisoned)
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)
    assert untouched(around)
    by_torch = x.clone()
    active_rows.scatter_rows_(by_torch, rows, count, poisoned, backend="torch")
    torch.testing.assert_close(by_torch, expected, rtol=0, atol=0)


def test_operators_are_well_formed():
    for case, detach in ((CASES[0], False), (CASES[4], True)):
        table, frozen, out, left, stays = given(case, FP32)
        arguments = table.requires_grad_(), frozen, out.requires_grad_(), left, stays, detach
        torch.library.opcheck(torch.ops.parlance.exit_copy.default, arguments)
    rows, count = active_rows.compact_rows(torch.tensor([True, False, True]), backend="torch")
    x = torch.randn(3, 4)
    torch.library.opcheck(torch.ops.parlance.compact_rows.default, (torch.tensor([True, False, True]),))
    torch.library.opcheck(torch.ops.parlance.gather_rows.default, (x, rows, count))
    torch.library.opcheck(torch.ops.parlance.scatter_rows_.default, (x.clone(), rows, count, x))


def test_the_operator_has_the_gradients_of_the_torch_backend(monkeypatch):
    monkeypatch.setattr(backend, "available_backends", lambda: ("torch", "cuda"))
    found = []
    for name in ("torch", "cuda"):
        table, frozen, out, left, stays = given(CASES[0], torch.float64)
        table.requires_grad_(), out.requires_grad_()
        next_, left_ = exit_copy(table, frozen, out, left, stays, True, backend=name)
        ((next_**2).sum() + (left_**3).sum()).backward()
        found.append([next_, left_, table.grad, out.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

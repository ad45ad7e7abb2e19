"""`sample_attention` with the kernels equals its definition in float64, forward and backward, for every edge."""

import pytest
import torch

from parlance_kernels import SampleMask, sample_attention
from parlance_kernels.sample_attention.reference import sample_attention_reference
from tests.gpu.cases import close, lengths_of, mask_of, states

pytestmark = pytest.mark.gpu
HEADS = 2


def run(mask, q, k, v, d, attend=sample_attention, **options):
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attend(*given, mask, **options)
    return [o.detach(), *torch.autograd.grad(o, given, d.to(o.dtype))]


def tensors(mask, width, dtype, device, seed=0):
    sizes = mask.n_rows, mask.n_keys, mask.n_keys, mask.n_rows
    return [states((n, HEADS, width), dtype, device, seed + i) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_equals_the_definition(device, width, dtype):
    for seed, most, samples in ((0, 40, 3), (1, 130, 4)):
        mask = mask_of(lengths_of(seed, most, samples))
        given = tensors(mask, width, dtype, device, seed)
        exact = run(mask, *(x.double() for x in given), attend=sample_attention_reference)
        for ours, right in zip(run(mask, *given, backend="cuda"), exact, strict=True):
            close(ours, right, dtype)


@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 65, 128, 511, 1024])
def test_every_length(device, length):
    most = 1024 if device.type == "cuda" else 65
    hidden = min(length, most) // 2
    mask = mask_of([(min(length, most) - hidden, hidden)])
    given = tensors(mask, 64, torch.bfloat16, device)
    exact = run(mask, *(x.double() for x in given), attend=sample_attention_reference)
    for ours, right in zip(run(mask, *given, backend="cuda"), exact, strict=True):
        close(ours, right, torch.bfloat16)


def test_scale_and_far_scores(device):
    mask = mask_of(lengths_of(2, 70, 3))
    q, k, v, d = tensors(mask, 64, torch.bfloat16, device)
    for factor, scale in ((1.0, 0.5), (30.0, None), (0.0, None)):
        given = factor * q, k, v, d
        exact = run(mask, *(x.double() for x in given), attend=sample_attention_reference, scale=scale)
        ours = run(mask, *given, scale=scale, backend="cuda")
        close(ours[0], exact[0], torch.bfloat16, 2.0)
        close(ours[3], exact[3], torch.bfloat16, 2.0)


def test_no_rows(device):
    mask = SampleMask.build([], 0)
    q = torch.zeros(0, HEADS, 64, dtype=torch.bfloat16, device=device)
    assert sample_attention(q, q, q, mask, backend="cuda").shape == (0, HEADS, 64)


def test_twice_the_same_bits(device):
    mask = mask_of(lengths_of(3, 150, 5))
    given = tensors(mask, 64, torch.bfloat16, device)
    for a, b in zip(run(mask, *given, backend="cuda"), run(mask, *given, backend="cuda"), strict=True):
        assert torch.equal(a, b)


def test_the_order_of_samples_does_not_matter(device):
    lengths = lengths_of(4, 100, 4)
    masks = [mask_of(part) for part in (lengths, lengths[::-1])]
    forward = tensors(masks[0], 64, torch.bfloat16, device)

    def turned(x, sizes):
        return torch.cat(x.split(sizes)[::-1])

    rows = [2 * (v + m) + 2 * m for v, m in lengths]
    keys = [v + 2 * m for v, m in lengths]
    sizes = rows, keys, keys, rows
    backward = [turned(x, size) for x, size in zip(forward, sizes, strict=True)]
    found = [run(mask, *given, backend="cuda") for mask, given in zip(masks, (forward, backward), strict=True)]
    for ours, other, size in zip(*found, (rows, rows, keys, keys), strict=True):
        torch.testing.assert_close(turned(ours, size), other, rtol=0, atol=0)


def test_nothing_leaks_from_keys_that_are_not_read(device):
    """Truth j is read by no NAR row, and by truth k and query k only where j <= k and j < k."""
    if device.type == "cpu":
        pytest.skip("PyTorch multiplies what is hidden by 0, and 0 times NaN is NaN")
    visible, hidden, poisoned = 20, 60, 33
    n = visible + hidden
    mask = mask_of([(visible, hidden)] * 2)
    q, k, v, d = tensors(mask, 64, torch.bfloat16, device)
    clean = run(mask, q, k, v, d, backend="cuda")
    key = n + poisoned
    k[key], v[key] = torch.nan, torch.nan
    dense = mask.materialise()[:, key].to(device)
    found = run(mask, q, k, v, torch.where(dense[:, None, None], 0, d), backend="cuda")
    assert dense.any() and not dense.all()
    assert torch.equal(found[0][~dense], clean[0][~dense])
    assert found[0][dense].isnan().all()
    assert torch.equal(found[1][~dense], clean[1][~dense])
    other = torch.ones(mask.n_keys, dtype=torch.bool, device=device)
    other[: n + hidden] = False  # the other sample's keys
    assert torch.equal(found[2][other], clean[2][other])
    assert torch.equal(found[3][other], clean[3][other])


def test_dropout_keeps_the_mean_and_its_generator(device):
    mask = mask_of([(300, 0)])
    q, k, v, _ = tensors(mask, 64, torch.bfloat16, device)
    k, v = torch.zeros_like(k), torch.ones_like(v)

    def drawn(seed):
        torch.manual_seed(seed)
        return sample_attention(q, k, v, mask, dropout_p=0.25, backend="cuda")[300:].float()  # rows that read all

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert abs(float(one.mean()) - 1) < 0.01
    # A row's mean of 300 weights, each 0 or 1 / 0.75: variance 0.25 / 0.75 / 300.
    assert abs(float(one[..., 0].std()) / (0.25 / 0.75 / 300) ** 0.5 - 1) < 0.15


def test_dropout_has_the_same_draw_in_the_backward(device):
    mask = mask_of([(40, 24)])
    q, k, v, d = tensors(mask, 64, torch.bfloat16, device)
    torch.manual_seed(3)
    o, _, _, dv = run(mask, q, k, v, d, dropout_p=0.5, backend="cuda")
    # o is linear in v: <d, o> = <dv, v>.
    lhs, rhs = float((d.double() * o.double()).sum()), float((dv.double() * v.double()).sum())
    assert abs(lhs - rhs) < 0.02 * float((d.double() * o.double()).abs().sum())

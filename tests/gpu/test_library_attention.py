"""The flash attention of torch keeps to what `flash.py` takes of it, and the split over it equals the definition.

With `--gpu-tests-on-cpu` the definition of the calls stands in for them.
"""

import pytest
import torch

from parlance_kernels import backend
from parlance_kernels.sample_attention import flash
from parlance_kernels.sample_attention.split import Call, split
from tests.gpu.cases import close, lengths_of, mask_of, states
from tests.kernels import flash_definition
from tests.kernels.cuda.attention import exact

pytestmark = pytest.mark.gpu
HEADS = 2
LENGTHS = [(1, 1), (1, 9), (63, 64), (64, 64), (65, 200), (130, 131)]  # rows and keys of parts


@pytest.fixture
def device(request, monkeypatch):
    """Where the tensors live; skips where torch has no flash attention."""
    if request.config.getoption("--gpu-tests-on-cpu"):
        flash_definition.install(monkeypatch)
        return torch.device("cpu")
    if why := backend.problem("library"):
        pytest.skip(why)
    return torch.device("cuda")


def call_of(lengths, causal, device):
    """A call whose tensors are the buffer as it is."""
    rows_of, keys_of = zip(*lengths, strict=True)
    rows, keys = (torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (rows_of, keys_of))
    none, most_rows, most_keys = rows[:0], max(rows_of), max(keys_of)
    return Call(causal, none, none, rows, keys, most_rows, most_keys), int(rows[-1]), int(keys[-1])


def on_cpu(call):
    return call._replace(row_ends=call.row_ends.cpu(), key_ends=call.key_ends.cpu())


def tensors(rows, keys, width, dtype, device, seed=0):
    return [states((n, HEADS, width), dtype, device, seed + i) for i, n in enumerate((rows, keys, keys, rows))]


def run(mask, q, k, v, d, dropout_p=0.0):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    scale = q.shape[2] ** -0.5
    o, lse, _ = flash.attention(*leaves, *split(mask, q.device), dropout_p, scale)
    return [o.detach(), lse, *torch.autograd.grad(o, leaves, d)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 64, 96, 128, 192])
def test_a_call_is_what_its_contract_says(device, width, dtype, causal):
    """Shape of the log-sum-exp, alignment of unequal lengths, and a backward from what it is told of the whole row."""
    call, n_rows, n_keys = call_of(LENGTHS, causal, device)
    q, k, v, d = tensors(n_rows, n_keys, width, dtype, device)
    o, lse, seed, offset = flash.varlen_forward(q, k, v, call, 0.0, 0.2)
    wide = [x.double().cpu() for x in (q, k, v, d)]
    right_o, right_lse, *_ = flash_definition.forward(*wide[:3], on_cpu(call), 0.0, 0.2)
    assert lse.shape == (HEADS, n_rows) and lse.dtype == torch.float32
    close(o, right_o, dtype)
    close(lse, right_lse, dtype)
    # As if other parts had as much weight again, and an output of their own.
    whole_lse, whole_o = lse + 0.7, (0.5 * o + 0.25).to(dtype)
    found = flash.varlen_backward(d, q, k, v, whole_o, whole_lse, seed, offset, call, 0.0, 0.2)
    given = wide[3], *wide[:3], whole_o.double().cpu(), whole_lse.double().cpu(), torch.tensor(0), None
    for ours, theirs in zip(found, flash_definition.backward(*given, on_cpu(call), 0.0, 0.2), strict=True):
        close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_split_equals_the_definition(device, width, dtype):
    for seed, most, samples in ((0, 40, 3), (1, 130, 4)):
        mask = mask_of(lengths_of(seed, most, samples))
        given = tensors(mask.n_rows, mask.n_keys, width, dtype, device, seed)
        right = exact(*(x.double() for x in given), mask, width**-0.5)
        for ours, theirs in zip(run(mask, *given), right, strict=True):
            close(ours, theirs, dtype)


@pytest.mark.parametrize("length", [1, 64, 65, 511, 1024])
def test_every_length(device, length):
    length = length if device.type == "cuda" else min(length, 65)
    mask = mask_of([(length - length // 2, length // 2), (length // 3, length - length // 3)])
    given = tensors(mask.n_rows, mask.n_keys, 64, torch.bfloat16, device)
    right = exact(*(x.double() for x in given), mask, 64**-0.5)
    for ours, theirs in zip(run(mask, *given), right, strict=True):
        close(ours, theirs, torch.bfloat16)


def test_nothing_leaks_from_other_samples(device):
    mask = mask_of([(20, 40), (30, 10)])
    q, k, v, d = tensors(mask.n_rows, mask.n_keys, 64, torch.bfloat16, device)
    clean = run(mask, q, k, v, d)
    of_first = 2 * 60 + 2 * 40  # rows, and 60 + 40 keys
    k[100:], v[100:], q[of_first:] = torch.nan, torch.nan, torch.nan
    found = run(mask, q, k, v, d)
    for index, size in ((0, of_first), (2, of_first), (3, 100), (4, 100)):
        torch.testing.assert_close(found[index][:size], clean[index][:size], rtol=2e-2, atol=1e-3)
        assert found[index][size:].isnan().all()


def test_dropout_has_the_same_draw_in_the_backward_and_keeps_the_mean(device):
    mask = mask_of([(40, 24)])
    q, k, v, d = tensors(mask.n_rows, mask.n_keys, 64, torch.bfloat16, device)

    def drawn(seed, q, v, d):
        torch.manual_seed(seed)
        return run(mask, q, k, v, d, dropout_p=0.25)

    o, _, _, _, dv = drawn(3, q, v, d)
    # o is linear in v: <d, o> = <dv, v>.
    lhs, rhs = float((d.double() * o.double()).sum()), float((dv.double() * v.double()).sum())
    assert abs(lhs - rhs) < 0.02 * float((d.double() * o.double()).abs().sum())
    ones = torch.ones_like(v)
    one, again, other = (drawn(seed, 0 * q, ones, d)[0][64:].float() for seed in (1, 1, 2))  # rows that read all
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert abs(float(one.mean()) - 1) < 0.03  # the library drops in steps of 1 / 255

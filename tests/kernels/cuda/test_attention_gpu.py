"""The attention kernels on a GPU: what the emulator cannot show, and lengths that it is too slow for."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from parlance_kernels import library, sample_attention
from tests.kernels.cuda.attention import causal, close, exact, janus, kept_factors, kernels, mask_of, tensors

pytestmark = pytest.mark.gpu
KINDS = [(dtype, width) for dtype in (torch.float16, torch.bfloat16) for width in (32, 64, 96, 128)]


@pytest.fixture(autouse=True)
def gpu():
    if library.problem():
        pytest.skip(library.problem())


def on_gpu(mask, heads, width, dtype, seed=0):
    return [x.cuda() for x in tensors(mask, heads, width, dtype, seed)]


def ragged(seed, samples, most):
    """JANUS samples of 1 .. most tokens, of which any number is hidden, with their causal rows."""
    sizes = torch.randint(1, most + 1, (samples, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = [(max(n, m) - min(n, m), min(n, m)) for n, m in sizes]
    return [sample for visible, hidden in pairs for sample in (janus(visible, hidden), causal(visible + hidden))]


@pytest.mark.parametrize(("dtype", "width"), KINDS)
@pytest.mark.parametrize("most", [40, 128, 1024])
def test_equals_the_definition(dtype, width, most):
    mask = mask_of([*ragged(most, 3, most), janus(most, 0), janus(0, most)])
    given = on_gpu(mask, 2, width, dtype)
    found = kernels(*given, mask, width**-0.5)
    close(found, exact(*given, mask, width**-0.5), dtype)
    for again in range(3):
        assert all(torch.equal(a, b) for a, b in zip(found, kernels(*given, mask, width**-0.5), strict=True)), again


@pytest.mark.parametrize(("dtype", "width"), KINDS)
def test_dropout_is_by_pair(dtype, width):
    mask, seed = mask_of([janus(20, 25), causal(210, query=False)]), torch.tensor([2**62 + 12345])
    given = on_gpu(mask, 1, width, dtype)
    found = kernels(*given, mask, 0.2, seed.cuda(), 0.3)
    close(found, exact(*given, mask, 0.2, kept_factors(mask, 1, seed, 0.3).cuda()), dtype)


def test_checkpointing_draws_again_what_it_drew():
    mask = mask_of(ragged(0, 4, 200))
    *given, d_o = on_gpu(mask, 2, 64, torch.bfloat16)
    leaves, found = [x.requires_grad_() for x in given], []

    def attend(q, k, v):
        return sample_attention(q, k, v, mask, dropout_p=0.2, backend="cuda")

    for run in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        torch.manual_seed(3)
        o = run(*leaves)
        found.append([o, *torch.autograd.grad(o, leaves, d_o)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

"""Attention in float64 by its definition, with gradients and dropout, and masks with every edge."""

import ctypes

import numpy as np
import torch

from parlance_kernels import SampleMask
from parlance_kernels.sample_attention import cuda
from parlance_kernels.sample_attention.plan import plan
from tests.kernels.cuda.emulation import host_library

CPU = torch.device("cpu")
NAMES = ["o", "lse", "d_q", "d_k", "d_v"]


def mask_of(samples):
    """Samples as lists of (rows, prefix, prefix_step, window_start, window_step, window_len) over as many keys as they
    reach; a sample may end with a number: keys that nobody reads."""
    segments, row, key = [], 0, 0
    for sample in samples:
        reach = 0
        for line in (x for x in sample if isinstance(x, tuple)):
            rows, prefix, prefix_step, window_start, window_step, window_len = line
            last = rows - 1
            segments.append((row, rows, key, *line[1:]))
            window_end = max(window_start, window_start + last * window_step) + window_len if window_len else 0
            reach = max(reach, prefix + max(0, last * prefix_step), window_end)
            row += rows
        key += reach + sum(x for x in sample if isinstance(x, int))
    return SampleMask.build(segments, key)


def janus(visible, hidden):
    """NAR content, compensation and AUX query rows of one sample; M = 0 and V = 0 as the objectives make them."""
    n = visible + hidden
    content = [(n, n, 0, 0, 0, 0)]
    if not hidden:
        return content
    return [*content, (hidden, visible, 0, visible + 1, 1, hidden), (hidden, visible, 0, visible, 1, hidden)]


def causal(n, query=True):
    """Content rows, and query rows over the same keys."""
    return [(n, 1, 1, 0, 0, 0)] * (2 if query else 1)


def tensors(mask, heads, width, dtype, seed=0):
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    sizes = mask.n_rows, mask.n_keys, mask.n_keys, mask.n_rows
    return [torch.randn(n, heads, width, generator=generator).to(dtype) for n in sizes]


def exact(q, k, v, d_o, mask, scale, kept=None):
    """o, lse, d_q, d_k, d_v in float64. kept: [H, R, K] factors that dropout gives the weights."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    visible = mask.materialise().to(q.device)
    scores = torch.einsum("rhd,khd->hrk", q, k) * scale
    lse = scores.masked_fill(~visible, -torch.inf).logsumexp(dim=-1)
    weights = torch.where(visible, (scores - lse.masked_fill(lse.isinf(), 0)[..., None]).exp(), 0.0)
    out = torch.einsum("hrk,khd->rhd", weights if kept is None else weights * kept, v)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out * d_o.double()).sum(), (q, k, v))]


def kernels(q, k, v, d_o, mask, scale, seed=None, p=0.0):
    """The same from the kernels."""
    given = *plan(mask, q.device, q.shape[2]), seed, p, scale
    o, lse = cuda.forward_cuda(q, k, v, *given)
    return [o, lse, *cuda.backward_cuda(d_o, q, k, v, o, lse, *given)]


def close(found, right, dtype):
    """Asserts that what `kernels` gave is what `exact` gave, but for the rounding of `dtype`."""
    for name, ours, theirs in zip(NAMES, found, right, strict=True):
        unit = 1e-6 if name == "lse" else 2e-3 if dtype == torch.float16 else 1e-2
        assert torch.equal(ours.isinf(), theirs.isinf()), name
        ours, theirs = (x.double().masked_fill(x.isinf(), 0) for x in (ours, theirs))
        assert float((ours - theirs).abs().max()) <= unit * max(1.0, float(theirs.abs().max())), name


def kept_factors(mask, heads, seed, p):
    """[H, R, K]: what dropout makes of each weight, from the coordinates of the pair alone (attention.h, `draw`)."""
    drop_below = round(p * 65536)
    factors = torch.zeros(heads, mask.n_rows, mask.n_keys, dtype=torch.float64)
    library, words = host_library(), {}
    for s in mask:
        for head in range(heads):
            for row in range(s.rows):
                for key in range(mask.n_keys - s.key_start):
                    counter = key & ~24, s.row_start + (row & ~8), head, 0
                    if counter not in words:
                        words[counter] = np.array(counter, np.uint32)
                        pointer = words[counter].ctypes.data_as(ctypes.c_void_p)
                        library.check_philox(ctypes.c_uint64(int(seed)), pointer)
                    half = int(words[counter][key >> 3 & 3]) >> 16 * (row >> 3 & 1) & 0xFFFF
                    kept = half >= drop_below
                    factors[head, s.row_start + row, s.key_start + key] = 65536 / (65536 - drop_below) if kept else 0
    return factors

"""What a variable-length attention library computes, written out part by part, in place of one that needs a GPU.

Shapes: P rows of a call, H heads, D head width, n rows and m keys of a part.
"""

from itertools import pairwise

import torch
from torch._subclasses import FakeTensor

from parlance_kernels.sample_attention import flash


def parts(call):
    """(rows, keys, bool [n, m]) of every part of a call; refuses parts without a key for some row."""
    ends = zip(pairwise(call.row_ends.tolist()), pairwise(call.key_ends.tolist()), strict=True)
    most_rows = most_keys = 0
    for (row, row_end), (key, key_end) in ends:
        n, m = row_end - row, key_end - key
        assert n > 0 and m > 0 and not (call.causal and m < n)
        most_rows, most_keys = max(most_rows, n), max(most_keys, m)
        visible = torch.ones(n, m, dtype=torch.bool)
        yield slice(row, row_end), slice(key, key_end), visible.tril(m - n) if call.causal else visible
    assert (most_rows, most_keys) == (call.most_rows, call.most_keys)


def kept(seed, number, heads, visible, p):
    """[H, n, m]: the factors of dropout in part `number`."""
    if not p:
        return torch.ones(heads, *visible.shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(int(seed) + number)
    return (torch.rand(heads, *visible.shape, generator=generator) >= p).double() / (1 - p)


def forward(q, k, v, call, dropout_p, scale):
    """`flash.varlen_forward` by its definition, in float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide)
    seed, offset = q.new_empty((), dtype=torch.int64), q.new_empty(0, dtype=torch.int64)
    if isinstance(q, FakeTensor):
        return o, lse, seed, offset
    assert len(q) == int(call.row_ends[-1]) and len(k) == len(v) == int(call.key_ends[-1])
    seed = torch.randint(2**40, ()) if dropout_p else torch.tensor(0)
    for number, (rows, keys, visible) in enumerate(parts(call)):
        scores = torch.einsum("nhd,mhd->hnm", q[rows].double(), k[keys].double()) * scale
        scores = scores.masked_fill(~visible, -torch.inf)
        weights = scores.softmax(dim=-1) * kept(seed, number, q.shape[1], visible, dropout_p)
        o[rows] = torch.einsum("hnm,mhd->nhd", weights, v[keys].double()).to(o.dtype)
        lse[:, rows] = scores.logsumexp(dim=-1).to(wide)
    return o, lse, seed, offset


def backward(d_o, q, k, v, o, lse, seed, offset, call, dropout_p, scale):
    """`flash.varlen_backward` as the papers give it: from the output and log-sum-exp that it is told."""
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for number, (rows, keys, visible) in enumerate(parts(call)):
        q_, k_, v_, o_, d_ = (x.double() for x in (q[rows], k[keys], v[keys], o[rows], d_o[rows]))
        factors = kept(seed, number, q.shape[1], visible, dropout_p)
        scores = torch.einsum("nhd,mhd->hnm", q_, k_) * scale
        p = torch.where(visible, (scores - lse[:, rows, None]).exp(), 0.0)
        d_p = torch.einsum("nhd,mhd->hnm", d_, v_) * factors
        d_s = p * (d_p - (d_ * o_).sum(dim=-1).T[:, :, None]) * scale
        found[0][rows] = torch.einsum("hnm,mhd->nhd", d_s, k_).to(q.dtype)
        found[1][keys] = torch.einsum("hnm,nhd->mhd", d_s, q_).to(k.dtype)
        found[2][keys] = torch.einsum("hnm,nhd->mhd", p * factors, d_).to(v.dtype)
    return tuple(found)


def install(monkeypatch):
    """Puts the definition where the library's two calls are."""
    monkeypatch.setattr(flash, "varlen_forward", forward)
    monkeypatch.setattr(flash, "varlen_backward", backward)

"""The attention kernels on the emulator against float64, forward and backward; what they must not read, and dropout."""

import functools
import math
import warnings

import numpy as np
import pytest
import torch

from parlance_kernels import SampleMask, backend, sample_attention
from parlance_kernels.sample_attention import cuda, op
from parlance_kernels.sample_attention import plan as planning
from parlance_kernels.sample_attention.plan import STRIP, STRIPS, TILE, parts, plan
from parlance_kernels.sample_attention.reference import sample_attention_reference
from tests.kernels.cuda.attention import (
    CPU,
    NAMES,
    causal,
    close,
    exact,
    janus,
    kept_factors,
    kernels,
    mask_of,
    tensors,
)
from tests.kernels.cuda.emulation import emulated, guarded, untouched
from tests.kernels.cuda.test_shared_header import random_segment

HALF, BF16 = torch.float16, torch.bfloat16
FULL = [(1, 1, 0, 0, 0, 0)]
MASKS = {
    "one pair": [FULL],
    "one row, many keys": [[(1, 150, 0, 0, 0, 0)]],
    "many rows, one key": [[(150, 1, 0, 0, 0, 0)]],
    "whole tiles": [[(64, 128, 0, 0, 0, 0)], [(128, 64, 0, 0, 0, 0)]],
    "nothing visible": [janus(0, 1), janus(0, 40), janus(0, 67)],
    "nothing hidden": [janus(1, 0), janus(70, 0)],
    "one hidden": [janus(64, 1), janus(15, 1)],
    "ragged": [causal(3), janus(20, 25), [], causal(130), [7], [(5, 65, 0, 0, 0, 0)], janus(33, 48)],
    "two shapes": [causal(9), causal(200), janus(3, 4)],
    "far window": [[(70, 3, 0, 70, 1, 9)], [(9, 0, 0, 130, -2, 5), (9, 5, 2, 30, 2, 40)]],
    "keys that nobody reads": [[40], causal(17), [70], [(20, 10, 0, 90, 0, 3), 100]],
}
# Other widths and the other dtype share the code; each meets a mask with every kind of tile.
CASES = [(name, BF16, 64) for name in MASKS] + [
    ("ragged", HALF, 64), ("ragged", HALF, 32), ("far window", BF16, 32), ("ragged", BF16, 96),
    ("far window", HALF, 96), ("far window", HALF, 128), ("keys that nobody reads", BF16, 128),
]  # fmt: skip


@pytest.fixture(params=["long", "short"])
def shape(request, monkeypatch):
    """The kernels that take samples of up to 192 keys, and those that take all."""
    if request.param == "long":
        monkeypatch.setattr(planning, "SHORT_KEYS", 0)
    return request.param


@pytest.mark.parametrize(("name", "dtype", "width"), CASES)
def test_equals_the_definition(name, dtype, width, shape):
    mask = mask_of(MASKS[name])
    given = tensors(mask, 2 if width == 64 else 1, width, dtype)
    with emulated():
        found = kernels(*given, mask, width**-0.5)
    close(found, exact(*given, mask, width**-0.5), dtype)


@pytest.mark.parametrize("seed", range(4))
def test_random_segments(seed, shape):
    random = np.random.default_rng(seed)
    segments = [random_segment(random, [-2, -1, 0, 0, 1, 1, 3]) for _ in range(5)]
    mask = mask_of([[(segment.rows, *segment[3:])] for segment in segments])
    given = tensors(mask, 1, 32, HALF, seed)
    with emulated(reverse=seed % 2 == 1):
        found = kernels(*given, mask, 0.3)
    close(found, exact(*given, mask, 0.3), HALF)


def test_rows_without_keys_are_zero_and_say_so(shape):
    # `SampleMask.build` refuses them; the kernels need not.
    table = np.array([(0, 70, 0, 0, 0, 0, 0, 0), (70, 40, 0, 0, 1, 0, 0, 0)], np.int32)
    mask = SampleMask(table, 50)
    given = tensors(mask, 1, 32, BF16)
    with emulated():
        found = kernels(*given, mask, 1.0)
    assert not found[0][:71].any()
    assert (found[1][0, :71] == -math.inf).all()
    assert not found[2][:71].any()
    close(found, exact(*given, mask, 1.0), BF16)


def poisoned(mask, seed=0):
    """The tensors of `mask`, and a function that gives copies with NaN, or `by`, in some rows and keys."""
    given = tensors(mask, 1, 64, BF16, seed)

    def poison(rows, keys, by=math.nan):
        q, k, v, d_o = (x.clone() for x in given)
        q[rows] = d_o[rows] = by
        k[keys] = v[keys] = by
        return q, k, v, d_o

    return given, poison


def test_nothing_leaks_from_another_sample_or_from_keys_that_nobody_reads(shape):
    samples = [causal(30), [3], janus(20, 50), causal(9), [(20, 10, 0, 90, 0, 3), 100]]
    mask = mask_of(samples)
    given, poison = poisoned(mask)
    with emulated():
        clean = kernels(*given, mask, 0.2)
        for victim in (0, 2, 3, 4):
            before, through = mask_of(samples[:victim]), mask_of(samples[: victim + 1])
            rows, keys = slice(before.n_rows, through.n_rows), slice(before.n_keys, through.n_keys)
            outside = torch.ones(mask.n_rows, dtype=torch.bool), torch.ones(mask.n_keys, dtype=torch.bool)
            outside[0][rows], outside[1][keys] = False, False
            read = mask.materialise().any(dim=0)
            found = kernels(*poison(outside[0], outside[1] | ~read), mask, 0.2)
            for name, ours, theirs in zip(NAMES, found, clean, strict=True):
                ours, theirs = (x.T if name == "lse" else x for x in (ours, theirs))
                inside = keys if name in ("d_k", "d_v") else rows
                assert torch.equal(ours[inside], theirs[inside]), (name, victim)
        assert not clean[3][~read].any()
        assert not clean[4][~read].any()


def test_a_row_is_deaf_to_every_key_it_does_not_read(shape):
    mask = mask_of([janus(20, 40), causal(70)])
    visible = mask.materialise()
    given, poison = poisoned(mask)
    nobody = torch.zeros(mask.n_rows, dtype=torch.bool)
    with emulated():
        clean = kernels(*given, mask, 0.2)
        for key in (0, 19, 20, 59, 60, 99, 100, 169):
            found = kernels(*poison(nobody, [key], by=3e4), mask, 0.2)
            deaf = ~visible[:, key]
            assert torch.equal(found[0][deaf], clean[0][deaf])
            assert torch.equal(found[2][deaf], clean[2][deaf])
            assert not torch.equal(found[0][~deaf], clean[0][~deaf])
        for row in (0, 59, 60, 99, 100, 239):  # a key gets nothing from a row that does not read it
            only = torch.arange(mask.n_rows) == row
            found = kernels(*poison(only, [], by=100.0), mask, 0.2)
            for i in (3, 4):
                assert torch.equal(found[i][~visible[row]], clean[i][~visible[row]])


def test_the_order_of_samples_changes_no_bit():
    samples = [causal(30), janus(20, 50), [(5, 65, 0, 0, 0, 0)], janus(3, 0), causal(66)]
    given = [tensors(mask_of([sample]), 2, 64, HALF, seed) for seed, sample in enumerate(samples)]
    found = {}
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        mask = mask_of([samples[i] for i in order])
        packed = [torch.cat(column) for column in zip(*(given[i] for i in order), strict=True)]
        with emulated():
            o, lse, d_q, d_k, d_v = kernels(*packed, mask, 0.2)
        for column in ((o, 0), (lse.T, 0), (d_q, 0), (d_k, 1), (d_v, 1)):
            sizes = [given[i][column[1]].shape[0] for i in order]
            for i, part in zip(order, column[0].split(sizes), strict=True):
                found.setdefault(i, []).append(part)
    for i, column in found.items():
        for first, second in zip(column[:5], column[5:], strict=True):
            assert torch.equal(first, second), i


def test_again_and_in_another_order_of_threads_gives_the_same_bits(shape):
    mask = mask_of(MASKS["ragged"])
    given, seed = tensors(mask, 1, 64, BF16), torch.tensor([77])
    found = []
    for reverse in (False, False, True):
        with emulated(reverse):
            found.append(kernels(*given, mask, 0.125, seed, 0.1))
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_nothing_is_read_or_written_beside_the_tensors(monkeypatch, shape):
    mask = mask_of([causal(30), janus(20, 50)])
    inside = [guarded(x, offset)[0] for offset, x in zip((8, 16, 8, 0), tensors(mask, 1, 64, BF16), strict=True)]
    made = []

    def guard(like):
        def wrapped(*args):
            made.extend(guarded(x) for x in like(*args))
            return tuple(x for x, _ in made[-3:])

        return wrapped

    forward = cuda._like
    monkeypatch.setattr(cuda, "_like", lambda *args: guard(forward)(*args)[-2:])
    monkeypatch.setattr(cuda, "_gradients_like", guard(cuda._gradients_like))
    with emulated():
        found = kernels(*inside, mask, 0.125)
    assert len(made) == 5
    assert all(untouched(around) for _, around in made)
    assert not any(x.isnan().any() for x in found)
    close(found, exact(*inside, mask, 0.125), BF16)


def test_tensors_that_lie_across_or_off_their_alignment():
    mask = mask_of([causal(20, query=False)])
    given = tensors(mask, 2, 32, HALF)
    across = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    shifted = [guarded(x, 1)[0] for x in given]
    with emulated():
        first, *others = (kernels(*x, mask, 0.2) for x in (given, across, shifted))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# Two samples of which the second begins inside the first, at a key that is no multiple of 16.
OVERLAPPING = SampleMask.build(
    [(0, 41, 0, 90, 0, 0, 0, 0), (41, 20, 44, 60, 0, 0, 0, 0), (61, 70, 8, 1, 1, 0, 0, 0)], 104
)


@pytest.mark.parametrize("mask", [mask_of([janus(20, 25), causal(40), [(5, 70, 0, 0, 0, 0)]]), OVERLAPPING])
def test_dropout_drops_the_same_pairs_forward_and_backward(mask, shape):
    p, seed = 0.3, torch.tensor([2**62 + 12345])
    given = tensors(mask, 2, 32, HALF)
    with emulated():
        found = kernels(*given, mask, 0.2, seed, p)
    kept = kept_factors(mask, 2, seed, p)
    close(found, exact(*given, mask, 0.2, kept), HALF)
    visible = mask.materialise()
    share = float((kept[:, visible] > 0).double().mean())
    assert abs(share - 0.7) < 4 * math.sqrt(0.21 / (2 * int(visible.sum())))


def test_dropout_hangs_on_the_seed_alone_and_keeps_the_mean():
    mask = mask_of([[(500, 32, 0, 0, 0, 0)]])
    q, k, v, d_o = torch.zeros(500, 1, 32), torch.zeros(32, 1, 32), torch.ones(32, 1, 32), torch.ones(500, 1, 32)
    given = [x.to(HALF) for x in (q, k, v, d_o)]
    with emulated():
        one, same, other = (kernels(*given, mask, 1.0, torch.tensor([n]), 0.25)[0] for n in (1, 1, 2))
        none = kernels(*given, mask, 1.0, torch.tensor([1]), 0.0)[0]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert (none == 1).all()
    assert abs(float(one.float().mean()) - 1) < 4 * math.sqrt(1 / 3 / (500 * 32))


def test_the_plan_has_every_row_and_key_once_and_the_longest_first():
    mask = mask_of([*MASKS["ragged"], causal(193), [(300, 20, 0, 0, 0, 0)], *MASKS["keys that nobody reads"]])
    words, sizes, room = plan(mask, CPU, 64)
    assert plan(mask, CPU, 32).words is words
    assert not plan(mask, CPU, 96).room
    segments, row_tiles, samples, strips, key_tiles, readers = parts(words, sizes)
    assert torch.equal(segments.view(-1, 8), mask.tensor())
    strips, samples = strips.view(-1, 2).tolist(), samples.view(-1, 4).tolist()
    used = [i for _, _, first, last in samples for i in range(first, last)]
    assert sorted(used) == list(range(len(strips)))
    work = [(s, r, TILE) for s, r in row_tiles.view(-1, 2).tolist()] + [(s, r, STRIP) for s, r in strips]
    rows = [mask.table[s, 0] + r + i for s, r, most in work for i in range(min(most, mask.table[s, 1] - r))]
    assert sorted(rows) == list(range(mask.n_rows))
    assert row_tiles.numel()
    for key, keys, first, last in samples:
        assert 0 < last - first <= STRIPS
        of = [mask.table[strips[i][0]] for i in range(first, last)]
        assert {int(line[2]) for line in of} == {key}
        assert keys <= room <= 192
    tiles = key_tiles.view(-1, 4).tolist()
    assert sorted(key + i for key, keys, _, _ in tiles for i in range(keys)) == list(range(mask.n_keys))
    visible = mask.materialise()
    for key, keys, first, last in tiles:
        reads = {i for i, s in enumerate(mask) if visible[s.row_start : s.row_start + s.rows, key : key + keys].any()}
        assert reads <= set(readers[first:last].tolist())
        assert readers[first:last].tolist() == sorted(readers[first:last].tolist())
    work = [int(mask.table[readers[first:last].tolist(), 1].sum()) for _, _, first, last in tiles]
    assert work == sorted(work, reverse=True)


@functools.cache
def operators_on_the_cpu():
    """The operators, with the emulated kernels for tensors on the CPU."""
    cuda.attention.register_kernel("cpu", cuda.forward_cuda)
    cuda.attention_backward.register_kernel("cpu", cuda.backward_cuda)


def test_operators_are_well_formed():
    operators_on_the_cpu()
    mask = mask_of([causal(5), janus(2, 3)])
    q, k, v, _ = tensors(mask, 1, 32, HALF)
    with emulated():
        for seed, p in ((None, 0.0), (torch.tensor([3]), 0.5)):
            given = *(x.clone().requires_grad_() for x in (q, k, v)), *plan(mask, CPU, 32), seed, p, 0.2
            torch.library.opcheck(torch.ops.parlance.sample_attention.default, given, rtol=1e-2, atol=1e-2)


def test_the_backend_reaches_them_with_the_gradients_of_the_definition(monkeypatch):
    operators_on_the_cpu()
    monkeypatch.setattr(backend, "available_backends", lambda: ("torch", "cuda"))
    monkeypatch.setattr(cuda, "supports", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    mask = mask_of([causal(20), janus(6, 7)])
    *given, d_o = tensors(mask, 2, 32, HALF)
    found = []
    for run, dtype in ((sample_attention, HALF), (sample_attention_reference, torch.float64)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in given]
        with emulated():
            o = run(*leaves, mask)
            found.append([o.detach(), *torch.autograd.grad((o * d_o).sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).abs().max()) <= 2e-3 * max(1.0, float(theirs.abs().max()))
    assert all(not x.requires_grad for x in found[0])
    torch.manual_seed(5)
    with emulated():
        first, second = (sample_attention(*given, mask, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(5)
        again = sample_attention(*given, mask, dropout_p=0.5)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_what_no_kernel_takes_goes_through_pytorch_with_a_warning(monkeypatch):
    monkeypatch.setattr(backend, "available_backends", lambda: ("torch", "cuda"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    mask = mask_of([causal(4)])
    *given, _ = tensors(mask, 1, 48, torch.float32)
    op._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"torch.float32 with heads of 48 goes through PyTorch.*32, 64, 96, 128"):
        found = sample_attention(*given, mask)
    torch.testing.assert_close(found, sample_attention_reference(*given, mask))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_attention(*given, mask)


def test_what_no_kernel_takes():
    mask = mask_of([causal(3)])
    q, k, v, d_o = tensors(mask, 1, 48, HALF)
    with emulated(), pytest.raises(ValueError, match=r"heads of 32, 64, 96, 128.*got torch.float16 \[1, 48\]"):
        kernels(q, k, v, d_o, mask, 1.0)
    q, k, v, d_o = tensors(mask, 1, 32, HALF)
    with emulated(), pytest.raises(ValueError, match=r"float16 or bfloat16.*torch\.float32"):
        kernels(q.float(), k, v, d_o, mask, 1.0)
    with emulated(), pytest.raises(ValueError, match="scale must be positive, got 0"):
        kernels(q, k, v, d_o, mask, 0)
    with pytest.raises(ValueError, match=r"dropout_p must be 0 \.\. 1 without 1, got 1\.0"):
        cuda.attend(q, k, v, mask, 1.0, 1.0)

"""The attention operator equals its definition, forward and backward, on every pattern and on odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parlance_kernels import SampleMask, available_backends, sample_attention
from parlance_kernels.sample_attention.reference import sample_attention_reference
from tests.kernels.test_sample_mask import masks, nar_aux_mask


def inputs(mask, heads=3, width=5, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    sizes = (mask.n_rows, mask.n_keys, mask.n_keys)
    return [torch.randn(n, heads, width, dtype=dtype, generator=make).requires_grad_() for n in sizes]


def gradients(function, given, mask):
    out = function(*given, mask)
    return [out.detach(), *torch.autograd.grad((out * out.cos()).sum(), given)]


@pytest.mark.parametrize("backend", available_backends())
@given(mask=masks(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_equals_the_reference_in_float64(backend, mask, seed):
    given_ = inputs(mask, seed=seed)
    ours = gradients(lambda q, k, v, m: sample_attention(q, k, v, m, backend=backend), given_, mask)
    for a, b in zip(ours, gradients(sample_attention_reference, given_, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", [[63, 63], [5, 1, 127, 63]])
def test_many_samples_share_a_buffer(lengths):
    segments, row = [], 0
    for n in lengths:
        segments.append((row, n, row, 1, 1, 0, 0, 0))
        row += n
    mask = SampleMask.build(segments, row)
    given_ = inputs(mask)
    for a, b in zip(
        gradients(sample_attention, given_, mask), gradients(sample_attention_reference, given_, mask), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@given(
    mask=masks(), heads=st.integers(1, 3), width=st.integers(1, 19), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_low_precision_of_any_shape_is_as_good_as_the_plain_computation(mask, heads, width, seed, dtype):
    low = [x.detach().to(dtype).requires_grad_() for x in inputs(mask, heads, width, seed=seed)]
    exact = gradients(sample_attention_reference, [x.detach().double().requires_grad_() for x in low], mask)
    plain, ours = (gradients(function, low, mask) for function in (sample_attention_reference, sample_attention))
    unit = 2**-8 if dtype == torch.float16 else 2**-5
    for a, b, c in zip(ours, exact, plain, strict=True):
        assert float((a - b).abs().max()) <= 3 * float((c - b).abs().max()) + unit * (1 + float(b.abs().max()))


def test_a_row_is_deaf_to_keys_it_does_not_read():
    mask = nar_aux_mask(5, 4)
    q, k, v = (x.detach() for x in inputs(mask))
    before = sample_attention(q, k, v, mask)
    visible = mask.materialise()
    for key in range(mask.n_keys):
        k2, v2 = k.clone(), v.clone()
        k2[key], v2[key] = 1e3, -1e3
        after = sample_attention(q, k2, v2, mask)
        deaf = ~visible[:, key]
        assert torch.equal(after[deaf], before[deaf])
        assert not torch.allclose(after[~deaf], before[~deaf])


def test_decoding_reads_its_cache_without_gradients():
    # Three hypotheses with room for eight steps each, two rows a hypothesis, five steps done.
    mask = SampleMask.build([(2 * i, 2, 8 * i, 5, 0, 0, 0, 0) for i in range(3)], 24)
    given_ = inputs(mask)
    with torch.no_grad():
        ours = sample_attention(*given_, mask)
    torch.testing.assert_close(ours, sample_attention_reference(*given_, mask).detach())


def test_dropout_drops_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    mask = SampleMask.build([(0, 2000, 0, 8, 0, 0, 0, 0)], 8)
    q, k, v = torch.zeros(2000, 1, 4), torch.zeros(8, 1, 4), torch.ones(8, 1, 4)
    out = sample_attention(q, k, v, mask, dropout_p=0.5)
    assert out.std() > 0.1
    assert abs(float(out.mean()) - 1.0) < 0.05


def test_no_rows_keep_the_graph():
    mask = SampleMask.build([], 0)
    given_ = inputs(mask)
    out = sample_attention(*given_, mask)
    assert out.shape == (0, 3, 5)
    assert all(g is not None for g in torch.autograd.grad(out.sum(), given_))


def test_contradictions_are_errors():
    mask = nar_aux_mask(2, 1)
    q, k, v = inputs(mask)
    with pytest.raises(ValueError, match="must have"):
        sample_attention(q[:-1], k, v, mask)
    with pytest.raises(ValueError, match="backend `tpu` must be one of"):
        sample_attention(q, k, v, mask, backend="tpu")


def test_a_new_mask_compiles_nothing_anew():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, dynamic=True)
    def around(q, k, v, mask):
        return sample_attention(q.sin(), k, v, mask).cos()

    def eagerly(q, k, v, mask):
        return sample_attention(q.sin(), k, v, mask).cos()

    frames = []
    for rows in range(3, 15):
        mask = SampleMask.build([(0, 3, 0, rows, 0, 0, 0, 0), (3, rows, 0, 1, 1, 0, 0, 0)], rows)
        given_ = inputs(mask, seed=rows)
        for a, b in zip(gradients(around, given_, mask), gradients(eagerly, given_, mask), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        frames.append(counter.frame_count)
    assert frames[-1] <= 3, "what is before the operator and what is behind it, one of them once more for other sizes"

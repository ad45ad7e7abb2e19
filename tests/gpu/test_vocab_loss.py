"""`vocab_loss` with the kernel between cuBLAS products equals its definition in float64, gradients included."""

import pytest
import torch

from parlance_kernels import vocab_loss
from parlance_kernels.vocab_loss.reference import vocab_loss_reference
from tests.gpu.cases import close, differentiated, states, vocab_problem

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def run(tensors, arguments, function=vocab_loss, factor=1.0, **options):
    given = [None if x is None else x.detach().requires_grad_() for x in tensors]
    total, ce, kl = function(*given[:2], bias_V=given[2], **arguments, **options)
    return [total.detach(), ce, kl, *differentiated(total * factor, given)]


def exactly(tensors, arguments, **options):
    wide = [None if x is None else x.double() for x in tensors]
    return run(wide, arguments, vocab_loss_reference, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 64, 513, 5021])
def test_equals_the_definition(device, vocabulary, dtype):
    for streams, tuples, plain, chunk, bias in ((1, 0, 9, 4, True), (2, 5, 3, 8, False), (3, 11, 6, 12, True)):
        problem = vocab_problem(device, dtype, tuples, streams, plain, vocabulary, 64, streams, bias)
        ours = run(*problem, label_smoothing=0.1, chunk_rows=chunk, backend="cuda")
        for found, right in zip(ours, exactly(*problem, label_smoothing=0.1), strict=True):
            close(found, right, dtype, 2.0)


def test_no_rows(device):
    ours = run(*vocab_problem(device, torch.bfloat16, 0, 3, 0, 33, 16, 0), backend="cuda")
    assert not any(x.any() for x in ours)


def test_bart_s_vocabulary(device):
    vocabulary, width = (50_265, 256) if device.type == "cuda" else (1001, 16)
    problem = vocab_problem(device, torch.bfloat16, 64, 3, 100, vocabulary, width, 0)
    small = [None if x is None else x * 0.2 for x in problem[0]]
    ours = run(small, problem[1], backend="cuda")
    for found, right in zip(ours, exactly(small, problem[1]), strict=True):
        close(found, right, torch.bfloat16)


def test_twice_the_same_bits(device):
    problem = vocab_problem(device, torch.bfloat16, 40, 3, 30, 1003, 64, 5)
    for a, b in zip(*(run(*problem, label_smoothing=0.1, backend="cuda") for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_equal_streams_have_no_divergence(device):
    tensors, arguments = vocab_problem(device, torch.bfloat16, 6, 3, 0, 501, 64, 6)
    rows = arguments["tuple_PK"]
    tensors[0][rows] = tensors[0][rows[:, :1]].clone()
    arguments["ce_scale"] = (0.0, 0.0, 0.0)
    ours = run(tensors, arguments, backend="cuda")
    assert max(float(x.abs().max()) for x in ours[2:]) < 1e-5


def test_rows_of_scale_0_have_no_gradient(device):
    tensors, arguments = vocab_problem(device, torch.float16, 0, 1, 12, 301, 32, 7)
    arguments["ce_scale"] = (1.0, 0.0, 1.0)
    ours = run(tensors, arguments, backend="cuda")
    ignored = arguments["term_R"] == 1
    assert not ours[3][ignored].any() and ours[3][~ignored].any()
    assert float(ours[1][1]) > 0


@pytest.mark.parametrize(("scale", "upstream"), [(1.6e-5, 65536.0), (1e-9, 2.0**30)])
def test_small_scales_survive_fp16(device, scale, upstream):
    tensors, arguments = vocab_problem(device, torch.float16, 9, 3, 12, 1009, 32, 8)
    for name in ("ce_scale", "kl_scale"):
        arguments[name] = tuple(scale * x for x in arguments[name])
    for ours, right in zip(
        run(tensors, arguments, factor=upstream, backend="cuda"),
        exactly(tensors, arguments, factor=upstream),
        strict=True,
    ):
        assert float((ours.double() - right).norm() / right.norm().clamp(min=1e-30)) < 3e-3


def test_poison_behind_the_states_reaches_nobody(device):
    """Nor does what lay in the logits' buffer before (torch.empty is NaN in tests)."""
    (h, weight, _), arguments = vocab_problem(device, torch.bfloat16, 3, 3, 5, 77, 16, 9)
    around = states((len(h) + 8, 16), torch.bfloat16, device, 0) * torch.nan
    around[4:-4] = h
    ours = run((around[4:-4], weight, None), arguments, chunk_rows=4, backend="cuda")
    assert all(x.isfinite().all() for x in ours)


def test_a_target_that_does_not_exist_is_told_by_nan(device):
    if device.type == "cpu":
        pytest.skip("PyTorch raises an error instead")
    (h, weight, _), arguments = vocab_problem(device, torch.bfloat16, 0, 1, 5, 77, 16, 9)
    arguments["target_R"][2] = 77
    total, _, _ = vocab_loss(h, weight, **arguments, backend="cuda")
    assert total.isnan()


def test_the_host_does_not_wait(device):
    if device.type == "cpu":
        pytest.skip("the host is the device")
    torch.use_deterministic_algorithms(False)  # which may wait, and fills fresh memory
    problem = vocab_problem(device, torch.bfloat16, 5, 3, 4, 77, 32, 11, bias=True)
    run(*problem, backend="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*problem, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_under_compile_and_checkpointing(device):
    if device.type == "cpu":
        pytest.skip("takes a compiler and half a minute")
    problem = vocab_problem(device, torch.bfloat16, 5, 3, 4, 128, 32, 10)
    expected = run(*problem, backend="cuda")
    found = run(*problem, function=torch.compile(vocab_loss, fullgraph=True), backend="cuda")

    def checkpointed(*given, **options):
        return torch.utils.checkpoint.checkpoint(lambda h, w: vocab_loss(h, w, **options), *given, use_reentrant=False)

    again = run(*problem, function=checkpointed, backend="cuda")
    for right, *others in zip(expected, found, again, strict=True):
        for other in others:
            torch.testing.assert_close(other, right, rtol=1e-3, atol=1e-4)

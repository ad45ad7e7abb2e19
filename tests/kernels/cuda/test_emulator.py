"""The emulator multiplies as tensor cores do and notices what a GPU would not tell."""

import ctypes
import re

import pytest
import torch

from tests.kernels.cuda.emulation import host_library


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype", "code"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_product_through_cp_async_ldmatrix_and_mma(dtype, code, reverse):
    generator = torch.Generator().manual_seed(code)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.full((16, 8), float("nan"))
    library = host_library()
    library.simt_reverse(ctypes.c_int64(reverse))
    try:
        given = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, c)]
        assert library.check_product(*given, ctypes.c_int64(code)) == 0
    finally:
        library.simt_reverse(ctypes.c_int64(0))
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


def mistake(kind, reverse=False):
    """The launch's error code and message, and the numbers of its 64 threads."""
    library, out = host_library(), torch.zeros(64)
    library.simt_reverse(ctypes.c_int64(reverse))
    try:
        given = [ctypes.c_void_p(x.data_ptr()) for x in (torch.arange(68.0), out)]
        code = library.check_mistake(ctypes.c_int64(kind), *given)
    finally:
        library.simt_reverse(ctypes.c_int64(0))
    return code, library.parlance_error(code).decode(), out


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "for ever: thread .* waits in __syncthreads, line .*thread 5 has left"),
        (1, "for ever: .*__shfl_sync"),
        (2, "wrote behind its 256 bytes of shared memory"),
        (3, "cp_async_16: an address must be a multiple of 16"),
        (7, "different operations: .*__syncthreads"),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_mistakes_end_the_launch(kind, message, reverse):
    code, said, _ = mistake(kind, reverse)
    assert code == 719
    assert re.search(message, said), said


def test_a_copy_that_nobody_waits_for_has_not_come():
    code, _, out = mistake(4)
    assert code == 0
    assert out.isnan().all()


def test_a_missing_barrier_shows_in_one_of_the_two_orders():
    for kind in (5, 6):
        assert any(mistake(kind, reverse)[2].isnan().sum() > 1 for reverse in (False, True))


def test_a_launch_after_a_failed_one_is_whole():
    assert mistake(0)[0] == 719
    assert mistake(9)[0] == 0

"""nvcc takes the attention kernels for every target, and they keep to their registers."""

import pytest

from tests.kernels.cuda.emulation import build_module, device_library_path

LONG = {"attention_forward", "attention_d_q", "attention_d_kv"}
SHORT = {"attention_forward_short", "attention_d_q_short"}  # for heads of 32 and 64


@pytest.mark.timeout(600)  # half a minute of nvcc on idle cores
def test_no_spills_and_three_blocks_a_multiprocessor_for_heads_of_64():
    device_library_path()
    found = [use for use in build_module().usage() if use.kernel in LONG | SHORT]
    kinds = {(use.kernel, use.arch, width, dtype) for use in found for width in (32, 64, 96, 128)
             for dtype in ("half", "bfloat16") if f"Li{width}E" in use.instance and dtype in use.instance}  # fmt: skip
    assert len(kinds) == len(found) == (len(LONG) * 4 + len(SHORT) * 2) * 2 * 2
    assert not [use for use in found if use.spilled or use.stack]
    # 65,536 registers for three blocks of 128 threads, in steps of 8. Wider heads have the 255 of two blocks.
    narrow = [use for use in found if "Li32E" in use.instance or "Li64E" in use.instance]
    assert not [use for use in narrow if use.registers > 168]

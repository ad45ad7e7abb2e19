"""Every source compiles for every target without spilling, within its registers; a launch without a driver says so."""

import ctypes
import re
import shutil

import pytest
import torch

from parlance_kernels import library
from tests.kernels.cuda.emulation import build_module, device_library_path, host_library

TARGETS = {"80", "90a"}
REGISTERS = {  # most that any instance may use: what its blocks on a multiprocessor leave a thread
    "compact_rows": 64,  # 1,024 threads must fit at all
    "exit_copy_gradients": 40,  # six blocks of 256: these move bytes, many loads must be under way
    "exit_copy_places": 40,
    "exit_copy_rows": 40,
    "move_rows": 40,
    "offramp_stats": 40,
    "vocab_loss_rows": 80,  # two blocks of 384; on sm_90a it is 64, two of 512
    "vocab_loss_sums": 40,
    "vocab_loss_total": 40,
}


def test_no_spills_and_registers_within_the_budget():
    device_library_path()
    # Those of attention depend on the width of a head: test_attention_build.py.
    usage = [use for use in build_module().usage() if not use.kernel.startswith("attention_")]
    assert {use.kernel for use in usage} == REGISTERS.keys()
    for kernel, most in REGISTERS.items():
        instances = [use for use in usage if use.kernel == kernel]
        assert {use.arch for use in instances} == TARGETS
        assert not [use for use in instances if use.spilled]
        assert not [use for use in instances if use.stack], "an array that is indexed by a variable lies in memory"
        assert not [use for use in instances if use.registers > most], kernel


def test_every_launcher_is_in_both_libraries():
    sources = build_module().sources()
    names = {
        name for source in sources for name in re.findall(r'extern "C" [^(]*?(parlance_\w+)\(', source.read_text())
    }
    assert {"parlance_error", "parlance_exit_copy", "parlance_offramp_stats"} <= names
    host = host_library()
    assert not [name for name in names if not hasattr(host, name)]
    device = ctypes.CDLL(str(device_library_path()))
    assert not [name for name in names if not hasattr(device, name)]


def test_a_launch_without_a_driver_says_so(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a driver is here")
    monkeypatch.setattr(library, "PATH", device_library_path())
    library.load.cache_clear()
    try:
        out = torch.zeros(1, dtype=torch.int64)
        with pytest.raises(library.KernelError, match=r"parlance_compact_rows: no NVIDIA driver .*\(CUDA error 35\)"):
            library.call("parlance_compact_rows", torch.ones(1, dtype=torch.bool), out, out.clone(), 1)
        with pytest.raises(library.KernelError, match=r"parlance_nothing is not in .*older than this code"):
            library.call("parlance_nothing", out)
    finally:
        library.load.cache_clear()


def test_targets():
    build = build_module()
    assert build.gencode("80+PTX;90a") == [
        *("-gencode", "arch=compute_80,code=[sm_80,compute_80]"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
    ]
    for bad in ("", "sm_80", "80;;90", "80+ptx"):
        with pytest.raises(build.BuildError, match="PARLANCE_CUDA_ARCHS must be like `80"):
            build.gencode(bad)


def test_no_compiler_is_said_in_one_line(monkeypatch, capsys):
    build = build_module()
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    assert build.main() == 1
    assert capsys.readouterr().err.startswith("no CUDA kernels: nvcc is not on PATH")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_what_has_not_changed_is_not_compiled_again(monkeypatch):
    build = build_module()
    made = build.build_for_host()
    stamp = made.stat().st_mtime_ns
    commands = []
    run = build._run
    monkeypatch.setattr(build, "_run", lambda command: commands.append(command) or run(command))
    assert build.build_for_host() == made
    assert made.stat().st_mtime_ns == stamp
    assert [command[1:] for command in commands] == [["--version"]]

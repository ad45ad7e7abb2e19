"""The backend is chosen once and says why it cannot be another; calls check what they pass."""

from pathlib import Path

import pytest
import torch

from parlance_kernels import available_backends, backend, exit_copy, library, offramp_stats, resolve, vocab_loss
from tests.kernels.cuda.emulation import device_library_path, emulated


@pytest.fixture
def fresh():
    """Choices are remembered; forget them before and after."""
    for remembered in (available_backends, library.load):
        remembered.cache_clear()
    yield
    for remembered in (available_backends, library.load):
        remembered.cache_clear()


class Card:
    """What torch says of a machine with GPUs."""

    def __init__(self, monkeypatch, *capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])


def test_without_a_device_there_is_torch(fresh, monkeypatch):
    Card(monkeypatch)
    assert available_backends() == ("torch",)
    assert resolve("auto") == resolve("torch") == "torch"
    why = "torch finds no CUDA device" if torch.version.cuda else "built without CUDA"
    with pytest.raises(ValueError, match=f"backend `cuda` must be one of auto, torch on this machine; .*{why}"):
        resolve("cuda")


def test_an_old_card_is_told_so(fresh, monkeypatch):
    Card(monkeypatch, (9, 0), (7, 5))
    with pytest.raises(ValueError, match=r"need compute capability 8\.0 or later, a device here has 7\.5"):
        resolve("cuda")
    assert resolve("auto") == "torch"


def test_a_library_that_was_not_built_is_told_so(fresh, monkeypatch, tmp_path):
    Card(monkeypatch, (9, 0))
    monkeypatch.setattr(library, "PATH", tmp_path / "libparlance_kernels.so")
    with pytest.raises(ValueError, match=r"the CUDA kernels are not built: no .*; `make kernels`"):
        resolve("cuda")
    library.PATH.write_bytes(b"no library")
    library.load.cache_clear()
    with pytest.raises(ValueError, match=r"does not open: .*`make kernels` builds it anew"):
        resolve("cuda")


def test_a_library_of_other_sources_is_refused(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "PATH", device_library_path())
    assert library.load()
    library.load.cache_clear()
    (tmp_path / "other.cu").write_text("// another kernel")
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    with pytest.raises(library.KernelError, match="was made of other sources than"):
        library.load()


def test_a_card_and_a_library_make_the_kernels_the_choice(fresh, monkeypatch):
    Card(monkeypatch, (9, 0))
    with emulated():
        assert available_backends() == ("torch", "cuda")
        assert resolve("auto") == resolve("cuda") == "cuda"
        assert resolve("torch") == "torch"


def test_a_card_without_our_kernels_takes_the_library_s_attention(fresh, monkeypatch, tmp_path):
    Card(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(library, "PATH", tmp_path / "libparlance_kernels.so")
    assert available_backends() == ("torch", "library")
    assert resolve("auto") == resolve("library") == "library"
    with pytest.raises(ValueError, match="one of auto, torch, library on this machine; the CUDA kernels are not built"):
        resolve("cuda")
    with emulated():
        available_backends.cache_clear()
        assert available_backends() == ("torch", "library", "cuda") and resolve("auto") == "cuda"


@pytest.mark.parametrize(
    ("capability", "flash", "why"),
    [
        ((7, 5), True, r"flash attention needs compute capability 8\.0 or later"),
        ((9, 0), False, "built without CUDA's"),
    ],
)
def test_a_card_or_a_torch_without_flash_attention_is_told_so(fresh, monkeypatch, tmp_path, capability, flash, why):
    Card(monkeypatch, capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)
    monkeypatch.setattr(library, "PATH", tmp_path / "libparlance_kernels.so")
    with pytest.raises(ValueError, match=f"backend `library` must be one of auto, torch on this machine; .*{why}"):
        resolve("library")
    assert resolve("auto") == "torch"


def test_the_backend_decides_what_runs(fresh, monkeypatch):
    monkeypatch.setattr(backend, "available_backends", lambda: ("torch", "cuda"))
    x, rows = torch.randn(3, 4), torch.tensor([1])
    loss = x, x, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64), rows[:0, None], (1.0,)
    calls = []
    for name, run in (
        ("parlance::exit_copy", lambda name: exit_copy(x, 1, x, rows, rows, False, backend=name)),
        ("parlance::offramp_stats", lambda name: offramp_stats(x, backend=name)),
        ("parlance::vocab_loss", lambda name: vocab_loss(*loss, backend=name)),
    ):
        for chosen, times in (("torch", 0), ("cuda", 1), ("auto", 1)):
            with torch.profiler.profile() as profile:
                run(chosen)
            calls.append((name, chosen, sum(event.name == name for event in profile.events()) - times))
    assert all(surplus == 0 for *_, surplus in calls), calls


def test_operators_compile_without_a_break_in_the_graph(fresh, monkeypatch):
    # To look for a device is nothing that a graph can hold.
    monkeypatch.setattr(library, "problem", lambda: Path("/dev/null").read_text() or None)
    x, left, stays = torch.randn(5, 4), torch.tensor([1]), torch.tensor([0, 3])

    def step(x, left, stays):
        table, gone = exit_copy(x, 2, 2 * x, left, stays, False, backend="cuda")
        return offramp_stats(table, [1], backend="cuda"), gone.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, left, stays), step(x, left, stays))


def test_a_call_takes_contiguous_tensors_on_one_device():
    square = torch.zeros(4, 4)
    with emulated():
        with pytest.raises(ValueError, match=r"tensors must be contiguous and on cpu, got \(1, 4\) on cpu"):
            library.call("parlance_gather_rows", square, square.T)
        with pytest.raises(ValueError, match=r"tensors must be contiguous and on cpu, got .* on meta"):
            library.call("parlance_gather_rows", square, square.to("meta"))


def test_a_launcher_refuses_a_dtype_it_does_not_know():
    x, i = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    place = torch.full((2, 2), -1, dtype=torch.int32)
    with emulated(), pytest.raises(library.KernelError, match=r"parlance_exit_copy_backward: .*\(CUDA error 1\)"):
        library.call("parlance_exit_copy_backward", x, x, i[:0], i[:0], place, x, x, 0, 0, 0, 2, 2, 2, 0, 9)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (35, "no NVIDIA driver here, or one older than the kernels' CUDA"),
        (209, "not compiled for this device .*PARLANCE_CUDA_ARCHS"),
        (700, r"parlance_compact_rows: .*\(CUDA error 700\)"),
    ],
)
def test_errors_of_a_launch_say_what_helps(code, message):
    class Broken:
        def parlance_error(self, code):
            return b"as CUDA says it"

        def parlance_compact_rows(self, *args):
            return code

    flag = torch.ones(1, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(library.KernelError, match=message):
        patch.setattr(library, "load", Broken)
        library.call("parlance_compact_rows", flag, None, None, 1)

"""The part of `doctor` that looks at what is installed: Python, packages, devices, kernels, engine, ranks.

What may hang or crash runs in a process of its own, so that a broken package hides nothing else.
"""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata, util
from pathlib import Path

from pretrain.report.check_machine import free_port
from pretrain.report.findings import Check, shown_bytes

PROJECT = "parlance"
INSTALL = "run `pip install -e .` in the checkout"
PATIENCE = 60.0  # seconds for the slowest import, on a busy machine and a network file system
IMPORT_DEEPSPEED = """
import json, pretrain.engine.deepspeed, deepspeed
from deepspeed.accelerator import get_accelerator
print(json.dumps([deepspeed.__version__, get_accelerator()._name, get_accelerator().communication_backend_name()]))
"""
SAY_HELLO = """
import sys
from pretrain import distributed
world = distributed.init(sys.argv[1])
assert distributed.sum_counts({"ranks": 1})["ranks"] == 2
distributed.shutdown()
"""


def python() -> Iterator[Check]:
    """The interpreter, against setup.py's bound."""
    here, wanted = platform.python_version(), _own_metadata("Requires-Python") or ">=3.11"
    from packaging.specifiers import SpecifierSet

    fits = SpecifierSet(wanted).contains(here, prereleases=True)
    found = f"{here} at {sys.executable}"
    yield Check("ok", "python", found) if fits else Check("FAIL", "python", f"{found}, must be {wanted}")


def packages() -> Iterator[Check]:
    """Installed versions against the bounds of setup.py."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires(PROJECT) or ()]
    except metadata.PackageNotFoundError:
        yield Check("FAIL", "packages", f"{PROJECT} is not installed in this Python: {INSTALL}")
        return
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = 0
    for one in needed:
        found = _version(one.name)
        if found is None or not one.specifier.contains(found, prereleases=True):
            wrong += 1
            yield Check("FAIL", one.name, f"must be {one.specifier}, is {found or 'missing'}: {INSTALL}")
    if not wrong:
        yield Check("ok", "packages", f"{len(needed)} within the bounds of setup.py")


def devices() -> Iterator[Check]:
    """What torch can compute on, and why it may not see a GPU that is there."""
    import torch

    driver = _driver()
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPUs only"
    yield Check("ok", "torch", f"{torch.__version__}, built for {built}, driver {driver or 'none'}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        device = torch.cuda.get_device_properties(number)
        memory = shown_bytes(device.total_memory)
        arch, known = f"sm_{device.major}{device.minor}", torch.cuda.get_arch_list()
        fits = runs_on(known, device.major, device.minor) or not known
        advice = "" if fits else f", torch has code for {' '.join(known)} only: install a build for {arch}"
        yield Check("ok" if fits else "FAIL", "device", f"cuda:{number} {device.name}, {memory}, {arch}{advice}")
    if not count and driver and not torch.version.cuda:
        yield Check("warn", "device", "a GPU driver is here, torch is a CPU build: install a CUDA build (pytorch.org)")
    elif not count and driver:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield Check(
            "warn", "device", f"torch sees no GPU: driver too old for it, or CUDA_VISIBLE_DEVICES={hidden!r} hides it"
        )
    elif not count:
        yield Check("ok", "device", "cpu: no GPU here")
    if count and os.environ.get("DS_ACCELERATOR") == "cpu":
        yield Check("warn", "device", "DS_ACCELERATOR=cpu: training will leave the GPUs alone; unset it to use them")


def runs_on(known: Sequence[str], major: int, minor: int) -> bool:
    """Whether a GPU of compute capability `major`.`minor` runs code for `known`, as `torch.cuda.get_arch_list` says.

    Binaries (`sm_86`) run from their own minor version on; PTX (`compute_86`) is compiled for whatever is newer; with a
    letter behind (`sm_90a`) they run on that very capability.
    """
    for name in known:
        if not (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)(\w?)", name)):
            continue
        kind, for_major, for_minor, letter = found[1], int(found[2]), int(found[3]), found[4]
        exact, older = (for_major, for_minor) == (major, minor), (for_major, for_minor) <= (major, minor)
        if exact or (not letter and older and (kind == "compute" or for_major == major)):
            return True
    return False


def kernels() -> Iterator[Check]:
    """Which implementation of the operators `engine.backend: auto` takes."""
    from parlance_kernels import available_backends, backend, resolve

    chosen, available = resolve("auto"), ", ".join(available_backends())
    absent = ((name, backend.problem(name)) for name in reversed(backend.BACKENDS))
    without = "".join(f"; no {name}: {why}" for name, why in absent if why)
    yield Check("ok", "kernels", f"`engine.backend: auto` takes {chosen}; available: {available}{without}")


def deepspeed() -> Iterator[Check]:
    """DeepSpeed as our engine imports it, and the accelerator it chooses."""
    code, out, err = _finish(_start(IMPORT_DEEPSPEED))
    if code:
        advice = "`pip install -e .`, or set `engine.kind: local`"
        yield Check("FAIL", "deepspeed", f"cannot be imported: {_last(err)}: {advice}")
        return
    version, accelerator, backend = json.loads(_last(out))
    yield Check("ok", "deepspeed", f"{version}, accelerator {accelerator}, communication {backend}")


def ranks() -> Iterator[Check]:
    """Two ranks on this machine that add one and one, the way a launcher starts them."""
    import torch

    for device, backend in (("cpu", "gloo"), *((("cuda", "nccl"),) if torch.cuda.device_count() > 1 else ())):
        port = str(free_port())
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        if device == "cpu":
            shared["DS_ACCELERATOR"] = "cpu"
        started = [_start(SAY_HELLO, device, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
        ends = [_finish(process) for process in started]
        wrong = next((err for code, _, err in ends if code), None)
        if wrong is None:
            yield Check("ok", backend, "two ranks on this machine understand each other")
        else:
            advice = "set GLOO_SOCKET_IFNAME=lo (NCCL_SOCKET_IFNAME) or let the host name resolve"
            yield Check("FAIL", backend, f"two ranks do not meet: {_last(wrong)}; {advice}")


def tensorboard() -> Iterator[Check]:
    """Training writes a board from the first update on."""
    from torch.utils.tensorboard import SummaryWriter

    yield Check("ok", "tensorboard", f"{_version('tensorboard')}, imported by {SummaryWriter.__module__}")


def apex() -> Iterator[Check]:
    """NVIDIA's apex is optional; the package of that name on PyPI is something else."""
    found = util.find_spec("apex")
    places = [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    if not found:
        yield Check("ok", "apex", "not installed, not needed")
    elif any((place / "optimizers").is_dir() for place in places):
        yield Check(
            "ok",
            "apex",
            f"NVIDIA's, {_version('apex') or 'version unknown'}; `optim.kind: apex_fused_adam` takes its Adam",
        )
    else:
        yield Check("warn", "apex", "is not NVIDIA's but a package of that name on PyPI: pip uninstall apex")


def _own_metadata(field: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError, KeyError):
        return metadata.metadata(PROJECT)[field]
    return None


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _driver() -> str | None:
    """Version of NVIDIA's kernel module; None where there is none."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d[\d.]*)", text)
        return found[1] if found else "of unknown version"
    return None


def _start(code: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    pipe, command = subprocess.PIPE, [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=os.environ | variables, stdout=pipe, stderr=pipe, text=True)


def _finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return 1, "", f"no answer in {PATIENCE:g} s"
    return process.returncode, out, err


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"

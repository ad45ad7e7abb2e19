"""Compiles the CUDA sources beside it: for GPUs with nvcc, for the CPU with g++ (host/simt.h). Needs no package.

    python kernels/csrc/build.py                 parlance_kernels/libparlance_kernels.so, and what ptxas says
    PARLANCE_CUDA_ARCHS='80;90a+PTX' python ...  other targets: nvcc's numbers, +PTX embeds code for later cards, too

Objects lie in build/kernels and are made anew only where a source, a header, a flag or the compiler has changed.
"""

import fcntl
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "parlance_kernels"
OBJECTS = HERE.parents[1] / "build" / "kernels"
NAME = "libparlance_kernels.so"
ARCHS = "80+PTX;90a"

NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "--threads", "2", "-Xcompiler", "-fPIC,-Wall", "-Xptxas", "-v", "-c"]
LINK_FLAGS = ["-shared", "-Xlinker", "--exclude-libs=ALL"]  # torch brings a CUDA runtime of its own
# Without fortification: longjmp between stacks is what fibers do.
HOST_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-c", "-x", "c++"]
HOST_FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]


class BuildError(Exception):
    """A compiler is missing or has failed; the message is what it said."""


class Usage(NamedTuple):
    """What ptxas reports of a kernel instance. spilled: bytes stored and loaded. stack: bytes of a thread's arrays."""

    source: str
    kernel: str
    instance: str
    arch: str
    registers: int
    spilled: int
    stack: int


def nvcc() -> str | None:
    """The compiler: of CUDA_HOME where that is set, else the one on PATH, else where CUDA installs it."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [str(Path(home) / "bin") if home else "" for home in homes]
    return shutil.which("nvcc", path=os.pathsep.join([places[0], os.environ.get("PATH", ""), places[1]]))


def sources() -> list[Path]:
    """Every kernel file."""
    return sorted(HERE.glob("*.cu"))


def fingerprint() -> str:
    """Of the sources as they are; `library.load` compares."""
    return str(runpy.run_path(str(PACKAGE / "sources.py"))["fingerprint"](HERE))


def gencode(archs: str) -> list[str]:
    """nvcc's flags for a list such as `80+PTX;90a`."""
    flags = []
    for arch in archs.replace(",", ";").split(";"):
        found = re.fullmatch(r"\s*(\d{2,3}[af]?)(\+PTX)?\s*", arch)
        if not found:
            raise BuildError(f"PARLANCE_CUDA_ARCHS must be like `{ARCHS}`, got `{archs}`")
        code = f"[sm_{found[1]},compute_{found[1]}]" if found[2] else f"sm_{found[1]}"
        flags += ["-gencode", f"arch=compute_{found[1]},code={code}"]
    return flags


def build(folder: Path = PACKAGE, archs: str | None = None) -> Path:
    """Compiles all kernels into one library in `folder`, with nvcc.

    Raises:
        BuildError: nvcc is absent or refuses.
    """
    compiler = nvcc()
    if compiler is None:
        raise BuildError("nvcc is not on PATH and CUDA_HOME does not have it")
    archs = archs or os.environ.get("PARLANCE_CUDA_ARCHS") or ARCHS
    command = [compiler, *NVCC_FLAGS, *gencode(archs)]
    with _alone():
        objects = _compile(sources(), command, "device")
        return _link(objects, [compiler, *LINK_FLAGS], folder / NAME)


def build_for_host(folder: Path = OBJECTS) -> Path:
    """The same sources and the entry points of the tests as a library that runs on the CPU, with g++."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("g++ is not on PATH")
    with _alone():
        objects = _compile([*sources(), *HERE.glob("host/*.cpp")], [compiler, *HOST_FLAGS], "host")
        return _link(objects, [compiler, "-shared"], folder / "libparlance_host.so")


def usage() -> list[Usage]:
    """Registers and spills of every kernel, from the last `build`."""
    found = []
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame"
        r", (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for log in sorted(OBJECTS.glob("device/*.log")):
        for mangled, arch, stack, stores, loads, registers in pattern.findall(log.read_text()):
            length, rest = re.findall(r"\A_ZN?L?(\d+)(\w+)", mangled)[0]
            kernel, instance = rest[: int(length)], rest[int(length) :]
            spilled = int(stores) + int(loads)
            source = log.name.rsplit("-", 1)[0]
            found.append(Usage(source, kernel, instance, arch, int(registers), spilled, int(stack)))
    return found


@contextmanager
def _alone() -> Iterator[None]:
    """Test processes that need the library at the same time compile it once."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with (OBJECTS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(files: Sequence[Path], command: Sequence[str], kind: str) -> list[Path]:
    folder = OBJECTS / kind
    folder.mkdir(parents=True, exist_ok=True)
    common = hashlib.sha256(_run([command[0], "--version"]).encode() + "\0".join(command).encode())
    for header in sorted(HERE.glob("*.h") if kind == "device" else HERE.rglob("*.h")):
        common.update(header.name.encode() + header.read_bytes())

    def one(source: Path) -> Path:
        own = [f'-DPARLANCE_SOURCES="{fingerprint()}"'] if source.stem == "library" else []
        digest = common.copy()
        digest.update("".join(own).encode() + source.read_bytes())
        made = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not made.exists():
            draft = made.with_suffix(".draft")
            made.with_suffix(".log").write_text(_run([*command, *own, str(source), "-o", str(draft)]))
            draft.replace(made)
        return made

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(one, files))
    for old in folder.iterdir():
        if old.stem not in {made.stem for made in objects}:
            old.unlink()
    return objects


def _link(objects: Sequence[Path], command: Sequence[str], library: Path) -> Path:
    if library.exists() and library.stat().st_mtime >= max(made.stat().st_mtime for made in objects):
        return library
    draft = library.with_suffix(".draft")
    _run([*command, *map(str, objects), "-o", str(draft)])
    draft.replace(library)  # a process that has the old one open keeps it
    return library


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main() -> int:
    """Builds and prints a table of what each kernel uses."""
    try:
        library = build()
    except BuildError as error:
        print(f"no CUDA kernels: {error}", file=sys.stderr)
        return 1
    print(f"{'source':18}{'kernel':28}{'target':8}{'registers':>10}{'spilled':>10}")
    for use in usage():
        print(f"{use.source:18}{use.kernel:28}sm_{use.arch:5}{use.registers:>10}{use.spilled:>10}")
    print(f"{library}: {library.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The part of `doctor` that looks at the machine, this folder and this shell: cores, memory, disk, port, variables."""

import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from pretrain.report.findings import Check, shown_bytes

DEFAULT_PORT = "29500"  # of the deepspeed launcher and of torchrun
HUB_PATIENCE = 4.0
GIGABYTE = 10**9
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SEEN = (*LAUNCHER, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "HF_HOME", "HF_HUB_OFFLINE")
SEEN_PREFIXES = ("SLURM_JOB_ID", "SLURM_N", "SLURM_PROCID", "NCCL_", "GLOO_")


def cores() -> Iterator[Check]:
    """Cores this process may use, and threads of a rank."""
    import torch

    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = _number("/sys/fs/cgroup/cpu.max", r"(\d+) (\d+)")
    allowed = min(usable, quota) if quota else usable
    threads = os.environ.get("OMP_NUM_THREADS")
    text = f"{allowed:g} of {present} cores usable, {torch.get_num_threads()} threads in this process"
    if threads is None:
        text += "; OMP_NUM_THREADS is not set, torchrun then gives each rank 1"
    narrow = allowed < present
    yield Check("warn" if narrow else "ok", "cores", text + (": ask the scheduler for more" if narrow else ""))


def memory() -> Iterator[Check]:
    """Free memory of the machine or the container, and the shared memory that data workers use."""
    import psutil

    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    limit = _number("/sys/fs/cgroup/memory.max", r"(\d+)")
    total = int(min(total, limit)) if limit else total
    text = f"{shown_bytes(free)} free of {shown_bytes(total)}"
    low = min(free, total) < 4 * GIGABYTE
    yield Check("warn" if low else "ok", "memory", text + (": `plan` tells what a configuration needs" if low else ""))
    if Path("/dev/shm").is_dir() and (shm := shutil.disk_usage("/dev/shm")).free < GIGABYTE:
        advice = "data workers hand batches over through it: docker run --shm-size=8g, or data.workers=0"
        yield Check("warn", "/dev/shm", f"{shown_bytes(shm.free)} free; {advice}")


def disk() -> Iterator[Check]:
    """Whether this folder can hold runs: space, rights, locks."""
    here = Path.cwd()
    try:
        with tempfile.TemporaryFile(dir=here) as probe:
            probe.write(b"x" * 4096)
            probe.flush()
            locks = True
            try:
                fcntl.lockf(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                locks = False
    except OSError as error:
        yield Check("FAIL", "disk", f"{here} cannot be written: {error.strerror}; choose `runs` elsewhere")
        return
    free = shutil.disk_usage(here).free
    low = free < 10 * GIGABYTE
    advice = ": a checkpoint takes 12 bytes a parameter, `keep` + 1 of them must fit" if low else ""
    yield Check("warn" if low else "ok", "disk", f"{shown_bytes(free)} free in {here}{advice}")
    if not locks:
        yield Check("warn", "locks", f"{here} is on a file system without locks: never start one run twice")


def port() -> Iterator[Check]:
    """Whether the port at which rank 0 waits is free."""
    wanted = os.environ.get("MASTER_PORT", DEFAULT_PORT)
    try:
        with socket.socket() as probe:
            # as those who wait there do: what a job that has just ended leaves behind is no obstacle
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", int(wanted)))
    except (OSError, ValueError, OverflowError) as error:
        advice = f"another run? give the launcher --master_port {free_port()}"
        yield Check("warn", "port", f"{wanted} cannot be used: {one_line(error)}; {advice}")
        return
    yield Check("ok", "port", f"{wanted} is free")


def environment() -> Iterator[Check]:
    """What launchers and schedulers have set in this shell, and whether it will mislead a start."""
    yield from launcher(os.environ)


def launcher(variables: Mapping[str, str]) -> Iterator[Check]:
    """The lines of `environment` for these variables; their values are shown, they are no secrets."""
    names = [name for name in sorted(variables) if name in SEEN or name.startswith(SEEN_PREFIXES)]
    seen = ", ".join(f"{name}={variables[name]}" for name in names)
    yield Check("ok", "environment", seen or "nothing of a launcher or scheduler is set")
    world = variables.get("WORLD_SIZE", "1")
    if "RANK" in variables and "WORLD_SIZE" in variables and world != "1":
        text = f"RANK and WORLD_SIZE={world} are set here: without a launcher training waits for the other ranks"
        yield Check("warn", "launcher", f"{text}; unset them, unless this is one of the ranks")
    elif ("RANK" in variables) != ("WORLD_SIZE" in variables):
        given = "RANK" if "RANK" in variables else "WORLD_SIZE"
        yield Check("warn", "launcher", f"only {given} of RANK and WORLD_SIZE is set: both or neither; it is ignored")
    tasks = variables.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in variables and tasks != "1" and "RANK" not in variables:
        text = f"a Slurm job of {tasks} tasks without RANK: each `srun python -m pretrain` is a run of its own"
        yield Check("warn", "slurm", f"{text}; let `srun` start torchrun, or set RANK, WORLD_SIZE and MASTER_ADDR")


def hub() -> Iterator[Check]:
    """Whether Hugging Face's hub answers; only `hf:` sources and Hub ids need it."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield Check("ok", "hub", "HF_HUB_OFFLINE is set: only local files and the cache are used")
        return
    address, answers = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), list[str]()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_PATIENCE).close()
            answers.append("")
        except urllib.error.HTTPError:
            answers.append("")  # it is there and speaks
        except urllib.error.URLError as error:
            answers.append(one_line(error.reason))
        except (OSError, ValueError) as error:
            answers.append(one_line(error))

    thread = threading.Thread(target=ask, daemon=True)  # no timeout reaches the look-up of a name
    thread.start()
    thread.join(HUB_PATIENCE)
    reason = answers[0] if answers else f"no answer in {HUB_PATIENCE:g} s"
    if reason:
        yield Check("warn", "hub", f"{address} is not reachable ({reason}): use local files (`text:`), not `hf:` ids")
    else:
        yield Check("ok", "hub", f"{address} answers")


def _number(path: str, pattern: str) -> float | None:
    """A limit of the control group: the first number of `pattern`, divided by the second; None for no limit."""
    with contextlib.suppress(OSError):
        if found := re.match(pattern, Path(path).read_text()):
            first, *rest = map(int, found.groups())
            return first / rest[0] if rest else float(first)
    return None


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def one_line(error: BaseException | str) -> str:
    """The message of an error, which may have many lines."""
    return " ".join(str(error).split())[:200] or type(error).__name__

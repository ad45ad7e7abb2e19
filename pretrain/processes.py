"""What processes do, asked of the system: does one run, is it there, who started this one?"""

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "torch.distributed.launch")


def system() -> str:
    """Names what numbers of processes hold in: this boot of this machine, and the container; hosts may share a name."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def launchers() -> list[psutil.Process]:
    """The processes of `deepspeed` or torchrun that started this one; ranks must not outlive them unseen."""
    found = []
    with suppress(psutil.Error):
        for parent in psutil.Process().parents():
            words = parent.cmdline()[:4]
            if not (words and "python" in words[0] and any(name in word for word in words for name in LAUNCHERS)):
                break
            found.append(parent)
    return found


def runs(pid: int, but: Iterable[int | None] = ()) -> bool:
    """Whether a thread of a process runs, would run if there were a core, or waits for a disk; True if unknown."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return pid == os.getpid()  # no such file system; a child has ended
    for task in tasks:
        if task.name.isdecimal() and int(task.name) not in but:
            with suppress(OSError):
                name, _, rest = (task / "stat").read_text(errors="replace").rpartition(")")
                # Lustre waits for its servers as `I`
                if rest[1:2] in ("R", "D", "I") and "pt_tcpstore" not in name:
                    return True
    return False


def children() -> list[psutil.Process]:
    """All that this process has started, and what those have."""
    try:
        return psutil.Process().children(recursive=True)
    except psutil.Error:
        return []


def living(pid: int | None) -> psutil.Process | None:
    """The process of that number on this machine; None where it has ended."""
    try:
        process = psutil.Process(pid) if pid is not None else None
        return process if process is not None and alive(process) else None
    except psutil.Error:
        return None


def alive(process: psutil.Process) -> bool:
    """False for one that has ended, also where nobody has taken its exit code yet."""
    return process.is_running() and state(process) not in (psutil.STATUS_ZOMBIE, "")


def state(process: psutil.Process) -> str:
    """As psutil names it; empty where the process has ended."""
    try:
        return str(process.status())
    except psutil.Error:
        return ""

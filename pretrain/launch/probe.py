"""What `launch-check` runs on every host. It is sent as text to a bare Python over ssh, so it needs nothing but the
standard library, and nothing of it is made from what people write: they are quoted in questions, as JSON.

A question is a line of JSON, {"ask": one of `ANSWERS`, ...}; an answer is a line of JSON after the mark that the first
question gave, because profiles of shells print things, too. When no more questions come, everything is taken back.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import pwd
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

CODE = ("pretrain", "finetune")
LIBRARY = "parlance_kernels"
COUNT_GPUS = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps([torch.cuda.get_device_properties(number).total_memory for number in range(count)]))
"""
PATIENCE = 90.0  # seconds to import torch from a slow file system
CONNECT_PATIENCE = 10.0
PROBE_BYTES = 1 << 16  # what must fit where checkpoints go
LARGEST_MANIFEST = 1 << 30

_written: list[Path] = []


def facts(asked: dict[str, Any]) -> dict[str, Any]:
    """What this host is and has. asked: folder (of the checkout), packages, files, data, run, exports.

    Only `folder` and what precedes it are told where there is no such folder.
    """
    shell = Path(pwd.getpwuid(os.getuid()).pw_shell).name
    told: dict[str, Any] = {
        "name": socket.gethostname(),
        "machine": [socket.gethostname(), _text("/proc/sys/kernel/random/boot_id")],
        "python": platform.python_version(),
        "shell": shell,
    }
    try:
        os.chdir(asked["folder"])
    except OSError as error:
        return {**told, "folder": error.strerror}
    sys.path[:0] = [path for path in asked["exports"].get("PYTHONPATH", "").split(":") if path]
    run = existing(Path(asked["run"]))
    space = os.statvfs(run)
    return {
        **told,
        "folder": None,
        "packages": {name: _version(name) for name in asked["packages"]},
        "code": dict(_code()),
        "files": {name: digest(Path(name)) for name in asked["files"]},
        "data": data(Path(asked["data"])),
        "run": str(run),
        "free": space.f_bavail * space.f_frsize,
        "memory": _memory(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": _gpus(asked["exports"]),
        "address": _address(),
        "own": _own_address(),
    }


def clock(asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds since 1970, as this host counts them."""
    return {"time": time.time()}


def listen(asked: dict[str, Any]) -> dict[str, Any]:
    """Waits at `port` as rank 0 will, and says `word` to whoever comes, until the end."""
    waiting = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    if waiting.family == socket.AF_INET6:
        waiting.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    # what a job that has just ended leaves behind is no obstacle
    waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    waiting.bind(("", asked["port"]))
    waiting.listen(1024)

    def greet() -> None:
        while True:
            caller, _ = waiting.accept()
            with caller, contextlib.suppress(OSError):
                caller.sendall(asked["word"].encode())

    threading.Thread(target=greet, daemon=True).start()
    return {}


def connect(asked: dict[str, Any]) -> dict[str, Any]:
    """What is said at `address`, `port`."""
    with socket.create_connection((asked["address"], asked["port"]), timeout=CONNECT_PATIENCE) as caller:
        heard = b""
        while part := caller.recv(1 << 10):
            heard += part
            if len(heard) > 1 << 10:
                break
    return {"heard": heard.decode(errors="replace")}


def write(asked: dict[str, Any]) -> dict[str, Any]:
    """Leaves a file of this `name` where the run will lie, with `word` in it, until the end."""
    path = existing(Path(asked["run"])) / asked["name"]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    _written.append(path)
    with os.fdopen(descriptor, "wb") as file:
        file.write(asked["word"].encode().ljust(PROBE_BYTES))
        file.flush()
        os.fsync(descriptor)
    return {}


def look(asked: dict[str, Any]) -> dict[str, Any]:
    """Which of `names` this host sees in `folder` with `word` in them."""
    wanted = hashlib.sha256(asked["word"].encode().ljust(PROBE_BYTES)).hexdigest()
    return {"seen": [name for name in asked["names"] if digest(Path(asked["folder"]) / name) == wanted]}


ANSWERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "facts": facts, "clock": clock, "listen": listen, "connect": connect, "write": write, "look": look
}  # fmt: skip


def digest(path: Path) -> str | None:
    """sha256 of a plain file or of what a link leads to; None where there is none that can be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if _plain(descriptor) else None
    except OSError:
        return None


def data(folder: Path) -> dict[str, Any]:
    """The sha256 of the manifest and the first file that has not the size it tells, or that is missing."""
    manifest = folder / "manifest.json"
    found = digest(manifest)
    if found is None or manifest.stat().st_size > LARGEST_MANIFEST:
        return {"manifest": None, "wrong": None}
    expected = {"index.npy": None, "tokenizer.json": None}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        expected |= {shard["file"]: shard["bytes"] for shard in json.loads(manifest.read_bytes())["shards"]}
    wrong = next((name for name, size in expected.items() if not _has(folder / name, size)), None)
    return {"manifest": found, "wrong": wrong}


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _code() -> Iterator[tuple[str, str]]:
    """(file, hash) of everything of ours that `python -m pretrain` here would run."""
    places = {name: Path(name) for name in CODE}
    found = importlib.util.find_spec(LIBRARY)
    if found is not None and found.origin is not None:
        places[LIBRARY] = Path(found.origin).parent
    for name, place in places.items():
        for parent, _, files in os.walk(place):
            for file in sorted(files):
                path = Path(parent) / file
                if path.suffix in (".py", ".so"):
                    yield str(Path(name) / path.relative_to(place)), (digest(path) or "")[:16]


def _has(path: Path, size: int | None) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and (size is None or found.st_size == size)


def _plain(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _gpus(exports: dict[str, str]) -> list[int] | str:
    """Bytes of each GPU that torch sees, as the ranks will; why it cannot tell. No torch where there is no driver."""
    if exports.get("DS_ACCELERATOR") == "cpu" or not any(map(os.path.exists, ("/proc/driver/nvidia", "/dev/kfd"))):
        return []
    command = [sys.executable, "-c", COUNT_GPUS]
    done = subprocess.run(command, env=os.environ | exports, capture_output=True, text=True, timeout=PATIENCE)
    try:
        counted: list[int] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return (done.stderr.strip().splitlines() or ["torch says nothing"])[-1][:300]
    return counted


def _memory() -> dict[str, int]:
    """Bytes that the host has, and that are free."""
    lines = dict(line.split(":", 1) for line in (_text("/proc/meminfo") or "").splitlines() if ":" in line)
    named = {"total": "MemTotal", "free": "MemAvailable"}
    return {name: int(lines.get(line, "0 kB").split()[0]) * 1024 for name, line in named.items()}


def _address() -> str | None:
    """What deepspeed takes for the address of the first host."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        return subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=20).stdout.split()[0]
    return None


def _own_address() -> str | None:
    """What the host name means here; gloo tells it to the others."""
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    return None


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _text(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return None


def main() -> None:
    """Answers until standard input ends."""
    mark = None
    try:
        for line in sys.stdin.buffer:
            asked = json.loads(line)
            mark = mark or asked["mark"]
            try:
                answer = ANSWERS[asked["ask"]](asked)
            except Exception as error:  # of whatever kind, it is an answer
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                answer = {"error": reason, "errno": getattr(error, "errno", None)}
            sys.stdout.write(f"{mark}{json.dumps(answer)}\n")
            sys.stdout.flush()
    finally:
        for path in _written:
            with contextlib.suppress(OSError):
                path.unlink()


if __name__ == "__main__":
    main()

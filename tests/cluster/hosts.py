"""Pseudo-hosts on one machine: each has a network, a name, processes and mounts of its own, and an sshd.

They are joined by a bridge that lives in a network of its own, so nothing of this machine's network changes. Files are
shared as on a cluster with one file system, unless a host hides a folder behind a mount. It takes root; everything ends
with process 1 of each host, by its id.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

NETWORK = "10.177.0"
PATIENCE = 60.0
NEEDED = ("ip", "pdsh", "ssh", "ssh-keygen", "/usr/sbin/sshd", "unshare", "nsenter", "mount", "setpriv")
WITH_US = ("setpriv", "--pdeathsig", "KILL")  # so that nothing outlives a test that is killed
INIT = """\
set -e
cd {folder}
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
hostname {name}
mount --bind hosts /etc/hosts
mount --bind ssh_config /etc/ssh/ssh_config
{mounts}
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
until ip -o -4 address show eth0 | grep -q inet; do sleep 0.02; done
/usr/sbin/sshd -f {folder}/sshd_config -E {folder}/sshd.{name}.log {options}
touch ready.{name}
trap 'exit 0' TERM
while :; do sleep 3600 & wait $!; done
"""
SSH = "Host *\n IdentityFile {folder}/id\n IdentitiesOnly yes\n StrictHostKeyChecking no\n" \
    " UserKnownHostsFile /dev/null\n LogLevel ERROR\n"  # fmt: skip
SSHD = "Port 22\nHostKey {folder}/hostkey\nPidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\n" \
    "PermitRootLogin prohibit-password\nAuthorizedKeysFile {folder}/id.pub\nMaxStartups 100:30:200\n"  # fmt: skip


def skip_where_impossible() -> None:
    """Skips the test, saying why, on a machine that cannot have pseudo-hosts."""
    if os.geteuid() != 0:
        pytest.skip("pseudo-hosts need root")
    if absent := [program for program in NEEDED if shutil.which(program) is None]:
        pytest.skip(f"pseudo-hosts need {', '.join(absent)} (Debian: pdsh openssh-server openssh-client iproute2)")
    tried = subprocess.run(["unshare", "-n", "-u", "-m", "-p", "-f", "--mount-proc", "true"], capture_output=True)
    if tried.returncode:
        pytest.skip(f"pseudo-hosts need namespaces: {tried.stderr.decode().strip()}")


class Hosts:
    """The hosts `names`; `with` starts and ends them.

    mounts: {name: shell commands that run before its sshd does}, to hide or replace what the others see. variables:
    {name: those that its sshd sets}.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        mounts: Mapping[str, Sequence[str]] | None = None,
        variables: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.folder, self.names = folder, list(names)
        self.mounts, self.variables = mounts or {}, variables or {}
        self._switch: subprocess.Popen[bytes] | None = None
        self._outer: dict[str, subprocess.Popen[bytes]] = {}
        self._first: dict[str, int] = {}  # process 1 of each, as this machine counts

    def __enter__(self) -> "Hosts":
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in ("id", "hostkey"):
            if not (self.folder / key).exists():
                _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key)
        addresses = "".join(f"{NETWORK}.{number} {name}\n" for number, name in enumerate(self.names, 1))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{addresses}")
        (self.folder / "ssh_config").write_text(SSH.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._outer):
            self.kill(name)
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()

    def _start(self) -> None:
        self._switch = subprocess.Popen([*WITH_US, "unshare", "-n", "sleep", "infinity"])
        mine = _namespace("self")
        until(lambda: _namespace(self._switch.pid) not in (None, mine), "the network of the switch")
        inside = ["nsenter", "-t", self._switch.pid, "-n", "ip", "link"]
        _run(*inside, "add", "br0", "type", "bridge")
        _run(*inside, "set", "br0", "up")
        for number, name in enumerate(self.names, 1):
            self._outer[name] = self._boot(name)
            self._first[name] = until(lambda name=name: self._child(name), f"process 1 of {name}")
            until(lambda name=name: _namespace(self._first[name]) not in (None, mine), f"the network of {name}")
            link, first, switch = f"pl{os.getpid() % 100000}h{number}", self._first[name], self._switch.pid
            _run("ip", "link", "add", link, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", first)
            _run(*inside, "set", link, "master", "br0", "up")
            there = ["nsenter", "-t", first, "-n", "ip"]
            _run(*there, "link", "set", "eth0", "up")
            _run(*there, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        for name in self.names:
            until((self.folder / f"ready.{name}").exists, f"sshd of {name}: {self.log(name)}")

    def _boot(self, name: str) -> "subprocess.Popen[bytes]":
        # At a deeper level bash does not take itself for started by sshd, and leaves this machine's ~/.bashrc alone.
        given = {"SHLVL": "1", **self.variables.get(name, {})}
        options = shlex.join(["-o", f"SetEnv={' '.join(f'{key}={value}' for key, value in given.items())}"])
        text = INIT.format(folder=self.folder, name=name, mounts="\n".join(self.mounts.get(name, ())), options=options)
        script = self.folder / f"init.{name}.sh"
        script.write_text(text)
        with (self.folder / f"init.{name}.log").open("wb") as log:
            words = [
                *WITH_US,
                "unshare",
                "-n",
                "-u",
                "-m",
                "-p",
                "-f",
                "--mount-proc",
                "--kill-child",
                "bash",
                str(script),
            ]
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _child(self, name: str) -> int | None:
        outer = self._outer[name].pid
        assert self._outer[name].poll() is None, self.log(name)
        with suppress(OSError):
            found = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
            return int(found[0]) if found else None
        return None

    def log(self, name: str) -> str:
        return (self.folder / f"init.{name}.log").read_text()

    def kill(self, name: str) -> None:
        """Ends a host as a power cut does: the kernel kills everything in it."""
        outer = self._outer.pop(name)
        if (first := self._first.pop(name, None)) is not None:
            with suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
        else:
            outer.kill()
        outer.wait()

    def command(self, name: str, folder: Path, *words: Any) -> list[str]:
        """What runs `words` on a host, in `folder`."""
        enter = ["nsenter", "-t", str(self._first[name]), "-n", "-u", "-m", "-p", f"--wd={folder}"]
        return [*enter, *map(str, words)]


def login(home: Path) -> dict[str, str]:
    """The variables of somebody who works on the first host; this Python's programs come first in PATH."""
    beside = Path(sys.executable).parent
    return {
        "HOME": str(home),
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "PATH": f"{beside}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def below(process: int) -> dict[int, list[str]]:
    """{process: its words} of all descendants of a process."""
    found: dict[int, list[str]] = {}
    with suppress(OSError):
        for child in map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()):
            found[child] = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            found |= below(child)
    return found


def pid_of(program: str, process: "subprocess.Popen[str]") -> int:
    """The one below `process` whose first words name `program`."""
    return next(pid for pid, words in below(process.pid).items() if any(Path(w).name == program for w in words[:2]))


def _namespace(process: int | str) -> str | None:
    with suppress(OSError):
        return str(Path(f"/proc/{process}/ns/net").readlink())
    return None


def until(ready: Any, what: str, patience: float = PATIENCE, told: Callable[[], str] = str) -> Any:
    """What `ready` returns once it is true; fails the test after `patience` seconds, with what `told` says."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if found := ready():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {patience:g} s for {what}{told()}")


def _run(*words: Any) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"

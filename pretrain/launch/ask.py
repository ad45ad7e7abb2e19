"""Asking all hosts at once over ssh: one connection a host, over which `probe.py` is sent and then questions.

ssh gets no word of the user's but the host, behind `--`, and the path of this Python, which deepspeed starts there too.
"""

import contextlib
import json
import os
import resource
import secrets
import select
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.launch import probe

SOURCE = Path(probe.__file__)
BOOT = "import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"
CONNECT_SECONDS = 10
PATIENCE = 120.0  # seconds for an answer; a host may import torch from a slow file system
LONGEST_ANSWER = 1 << 24
Answer = dict[str, Any]


def command(host: str | None, ssh_port: int | None) -> list[str]:
    """The words of ssh, of which the last one is for the shell of the host; None: what runs here, without ssh."""
    if host is None:
        return [sys.executable, "-uP", "-c", BOOT]
    port = [] if ssh_port is None else ["-p", str(ssh_port)]
    remote = f"exec {shlex.quote(sys.executable)} -uP -c {shlex.quote(BOOT)}"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    return ["ssh", "-T", "-a", "-x", *options, *port, "--", host, remote]


class Session:
    """One host that is asked; None for this one. `ended`: why there will be no more answers."""

    def __init__(self, host: str | None, ssh_port: int | None = None) -> None:
        self.ended = ""
        self._mark = f"answer-{secrets.token_hex(8)} "
        self._unread = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the session
        pipe = subprocess.PIPE
        try:
            self._ssh = subprocess.Popen(command(host, ssh_port), stdin=pipe, stdout=pipe, stderr=self._errors)
        except FileNotFoundError:
            raise ConfigError("`ssh` must be in PATH: the launcher reaches the hosts with it") from None
        program = SOURCE.read_bytes()
        self._send(b"%d\n%b" % (len(program), program))

    def send(self, question: Mapping[str, Any]) -> None:
        """Asks without waiting."""
        self._send(json.dumps({"mark": self._mark, **question}).encode() + b"\n")

    def receive(self, deadline: float) -> Answer:
        """The next answer, or {"error": ...}; the session has `ended` if there was none."""
        mark = self._mark.encode()
        while not self.ended:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                if line.startswith(mark):
                    with contextlib.suppress(ValueError, RecursionError):
                        answer = json.loads(line[len(mark) :])
                        if isinstance(answer, dict):
                            return answer
                continue
            self._read(deadline)
        return {"error": self.ended}

    def hang_up(self) -> None:
        """Ends the questions, and so the program on the host, which takes back what it did."""
        assert self._ssh.stdin
        with contextlib.suppress(OSError):
            self._ssh.stdin.close()

    def close(self) -> None:
        """Waits for the program, after `hang_up`."""
        try:
            self._ssh.wait(CONNECT_SECONDS)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()
        assert self._ssh.stdout
        self._ssh.stdout.close()
        self._errors.close()

    def _send(self, content: bytes) -> None:
        assert self._ssh.stdin
        with contextlib.suppress(BrokenPipeError):  # the next answer tells why
            self._ssh.stdin.write(content)
            self._ssh.stdin.flush()

    def _read(self, deadline: float) -> None:
        assert self._ssh.stdout
        descriptor = self._ssh.stdout.fileno()
        poll = select.poll()  # not `select`, which knows the first 1,024 files alone
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            self.ended = f"no answer in {PATIENCE:g} s"
        elif part := os.read(descriptor, 1 << 16):
            self._unread += part
            if len(self._unread) > LONGEST_ANSWER:
                self.ended = f"printed {LONGEST_ANSWER} bytes that are no answer"
        else:
            self.ended = self._reason(self._ssh.wait())

    def _reason(self, code: int) -> str:
        self._errors.seek(0)
        lines = self._errors.read(1 << 16).decode(errors="replace").splitlines()
        told = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")[:300]
        if code == 255:
            return f"not reachable: {told}"
        if code in (126, 127):
            return f"deepspeed starts {sys.executable} on every host, it cannot be started there: {told}"
        return f"{sys.executable} ends there: {told}"


@contextlib.contextmanager
def sessions(hosts: Sequence[str | None], ssh_port: int | None) -> Iterator[list[Session]]:
    """Connects to all hosts at once; None is this one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each takes three of them
    opened: list[Session] = []
    try:
        for host in hosts:
            opened.append(Session(host, ssh_port))
        yield opened
    finally:
        for session in opened:
            session.hang_up()
        for session in opened:
            session.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def ask(asked: Sequence[Session], question: Mapping[str, Any], own: Sequence[Mapping[str, Any]] = ()) -> list[Answer]:
    """The answer of each. own: what is added to the question for each of them."""
    for number, session in enumerate(asked):
        session.send({**question, **(own[number] if own else {})})
    deadline = time.monotonic() + PATIENCE
    return [session.receive(deadline) for session in asked]


def clocks(asked: Sequence[Session]) -> list[tuple[float, float] | None]:
    """(seconds that the clock of a host is ahead of ours, how wrong that may be), one after the other."""
    found: list[tuple[float, float] | None] = []
    for session in asked:
        before = time.time()
        answer = ask([session], {"ask": "clock"})[0]
        after = time.time()
        told: Any = answer.get("time")
        found.append((told - (before + after) / 2, (after - before) / 2) if isinstance(told, float) else None)
    return found

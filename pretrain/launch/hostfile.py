"""The hostfile of the deepspeed launcher, read more strictly than deepspeed reads it.

deepspeed takes whatever stands before ` slots=` for a host and hands it to ssh and pdsh, where `-oProxyCommand=...` is
an option, `n[1-4]` a list and `^file` the name of another file. Here a host is a plain name or an address.
"""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from pretrain.plain import read_plain
from pretrain.report.findings import Check, fail

LARGEST_HOSTFILE = 1 << 20
MOST_HOSTS = 1024  # pdsh is told to serve so many at once; one more would wait for the others to end
MOST_SLOTS = 256  # devices of a machine; deepspeed makes a list of as many as it is told
_LINE = re.compile(r"(\S+)[ \t]+slots=(\S*)[ \t]*(#.*)?", re.DOTALL)
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


@dataclass(frozen=True)
class Host:
    """A line of the hostfile. slots: ranks it is to run. first: the rank of its slot 0."""

    name: str
    slots: int
    first: int

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.slots)


def read_hostfile(path: str | Path) -> tuple[list[Host], list[Check]]:
    """The hosts in their order and a FAIL for every bad line; with one of those the hosts are not to be used."""
    try:
        text = read_plain(Path(path), LARGEST_HOSTFILE).decode()
    except (OSError, UnicodeDecodeError) as error:
        return [], [fail("hostfile", f"`{path}` cannot be read: {error}")]
    return parse_hostfile(text)


def parse_hostfile(text: str) -> tuple[list[Host], list[Check]]:
    """`read_hostfile` of a text."""
    hosts: list[Host] = []
    problems: list[Check] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines_of(text), 1):
        line = line.strip(" \t")
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        problem = _problem(found[1], found[2]) if found else "must be `HOST slots=N`"
        if found and not problem and (before := seen.setdefault(_same(found[1]), number)) != number:
            problem = f"a host must stand there once, it stands in line {before} too"
        if found and not problem:
            hosts.append(Host(found[1], int(found[2]), hosts[-1].ranks.stop if hosts else 0))
        else:
            problems.append(fail(f"line {number}", f"{problem}, got {line!r:.120}"))
    if not seen and not problems:
        problems.append(fail("hostfile", "must name at least one host, as `HOST slots=N`, it names none"))
    if len(hosts) > MOST_HOSTS:
        problems.append(fail("hostfile", f"must name at most {MOST_HOSTS} hosts, it names {len(hosts)}"))
    return hosts, problems


def lines_of(text: str) -> list[str]:
    """The lines that Python's `open` would give to deepspeed; `str.splitlines` knows more ends than that."""
    return re.split(r"\r\n|\r|\n", text)


def is_host(name: str) -> bool:
    """Whether `name` is an IPv4 or IPv6 address or a host name, and so nothing else to ssh, pdsh or a shell."""
    if not name.isascii() or "%" in name:  # IPv6 zones; pdsh reads % itself
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        labels = name.split(".")
        # ssh reads 127.1, 010.0.0.1 and 0x7f000001 as addresses, of which no eye sees which
        numeric = re.fullmatch(r"[0-9]+|0[xX][0-9A-Fa-f]*", labels[-1])
        return len(name) <= 253 and not numeric and all(_LABEL.fullmatch(label) for label in labels)
    return True


def _problem(name: str, slots: str) -> str | None:
    if not is_host(name):
        return "HOST must be a plain host name or an address (ssh's own configuration knows users and ports)"
    if not re.fullmatch(r"[0-9]{1,9}", slots) or not 1 <= int(slots) <= MOST_SLOTS:
        return f"`slots` must be a whole number from 1 to {MOST_SLOTS}"
    return None


def _same(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower()

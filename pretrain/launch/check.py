"""`launch-check`: can `deepspeed --hostfile FILE --launcher pdsh` start this configuration; it starts nothing.

First what is here: the hostfile, what deepspeed would export, the words of its command, the configuration. Only if none
of that is wrong are the hosts asked, all at once, and the table says what each would get.

The exit code is that of the first FAIL: 3 for hosts, environment and configuration, 4 for data that is not everywhere,
5 for a run that is in use, 6 for a disk.
"""

import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.holder import in_use
from pretrain.errors import CheckpointError, ParlanceError, UsageError
from pretrain.launch import remote_shell
from pretrain.launch.ask import Session, ask, clocks, sessions
from pretrain.launch.hostfile import Host, is_host, read_hostfile
from pretrain.launch.judge import Asked, judge_folder, judge_hosts, judge_port
from pretrain.launch.needs import Needs, needs
from pretrain.launch.remote_shell import Export
from pretrain.report.findings import Check, shown_bytes
from pretrain.runs import PACKAGES

LARGEST_PORT = 65535


@dataclass(frozen=True)
class Rendezvous:
    """The options of deepspeed that say where ranks meet; None for its own choice."""

    master_addr: str | None
    master_port: int
    ssh_port: int | None

    def words(self, hostfile: str | Path) -> list[str]:
        """The command line of deepspeed, up to the module."""
        given = {"--master_addr": self.master_addr, "--master_port": self.master_port, "--ssh_port": self.ssh_port}
        options = [str(word) for name, value in given.items() if value is not None for word in (name, value)]
        return ["deepspeed", "--hostfile", str(hostfile), "--launcher", "pdsh", *options]


def launch_check(hostfile: str | Path, config_path: str | Path, overrides: Sequence[str], where: Rendezvous) -> None:
    """Prints what each host gets and a line for each problem.

    Raises:
        ParlanceError: training cannot start so; of the kind that the first problem calls for.
    """
    if where.master_addr is not None and not is_host(where.master_addr):
        raise UsageError(f"`--master_addr` must be a host name or an address, got {where.master_addr!r}")
    for name in ("master_port", "ssh_port"):
        if (port := getattr(where, name) or 1) > LARGEST_PORT:
            raise UsageError(f"`--{name}` must be at most {LARGEST_PORT}, got {port}")
    words = ["train", str(config_path), *overrides]
    hosts, lines = read_hostfile(hostfile)
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    exported, wrong = remote_shell.exports(os.environ, Path.home(), Path.cwd(), cuda)
    lines += [*wrong, *remote_shell.check_words(sys.executable, Path.cwd(), words), *_programs()]
    wanted = None
    try:
        wanted = needs(config_path, overrides, hosts)
        if user := in_use(wanted.settings.run_dir):
            lines.append(Check("FAIL", "run", f"`{wanted.settings.run_dir}` is {user}", CheckpointError))
    except ParlanceError as error:
        lines.append(Check("FAIL", "config", str(error), type(error)))
    lines += remote_shell.warnings(os.environ, exported)
    if len(hosts) == 1:
        text = "is the only host: deepspeed then starts the ranks on this machine, unless it is given --force_multi"
        lines.append(Check("warn", hosts[0].name, text))
    ranks = sum(host.slots for host in hosts)
    print(f"launch-check of {config_path} on {len(hosts)} host(s), {ranks} rank(s); nothing is started\n")
    if wanted is None or any(line.level == "FAIL" for line in lines):
        _show(lines, "nothing was asked of the hosts")
        return
    values = {name: one.value for name, one in exported.items()}
    with sessions([None, *(host.name for host in hosts)], where.ssh_port) as (here, *asked):
        found, told = _ask(hosts, here, asked, wanted, where, values)
    _table(found, wanted)
    print(f"\nevery host gets {_arriving(exported)}; deepspeed adds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, ...\n")
    lines += told
    if not any(line.level == "FAIL" for line in lines):
        alike = "the same code, packages, configuration, data and run folder"
        lines.append(Check("ok", "hosts", f"{len(hosts)} have {alike}, and reach {hosts[0].name}"))
    _show(lines, "training cannot start on these hosts until this is right")
    print(f"\nstart: {shlex.join([*where.words(hostfile), '--module', 'pretrain', *words])}")


def _ask(
    hosts: Sequence[Host],
    here: Session,
    sessions: Sequence[Session],
    wanted: Needs,
    where: Rendezvous,
    exports: Mapping[str, str],
) -> tuple[list[Asked], list[Check]]:
    """What the hosts answered about themselves, and all problems."""
    settings = wanted.settings
    question = {
        "ask": "facts",
        "folder": str(Path.cwd()),
        "packages": PACKAGES,
        "files": wanted.files,
        "data": settings.data.path,
        "run": str(settings.run_dir),
        "exports": exports,
    }
    mine, *told = ask([here, *sessions], question)
    if "error" in mine:
        raise ParlanceError(f"this machine cannot be asked: {mine['error']}")
    ahead = clocks(sessions)
    first = ahead[0] or (0.0, 0.0)
    apart = [None if one is None else (one[0] - first[0], one[1] + first[1]) for one in ahead]
    asked = [Asked(host, facts, clock) for host, facts, clock in zip(hosts, told, apart, strict=True)]
    lines = list(judge_hosts(asked, mine, wanted, exports))
    alive = [(one, session) for one, session in zip(asked, sessions, strict=True) if one.usable]
    if alive and alive[0][0].host is hosts[0]:
        lines += _meet([one for one, _ in alive], [session for _, session in alive], where)
    if alive:
        lines += _share([one for one, _ in alive], [session for _, session in alive], settings.run_dir)
    return asked, lines


def _meet(asked: Sequence[Asked], sessions: Sequence[Session], where: Rendezvous) -> Iterator[Check]:
    """Rank 0's port, on the first of the hosts, and the way of the others to it."""
    first, port, word = asked[0], where.master_port, secrets.token_hex(16)
    address = where.master_addr or first.facts["address"]
    if address is None:
        text = "`hostname -I`, which deepspeed asks for the address of rank 0, tells none there: give --master_addr"
        yield Check("FAIL", first.host.name, text)
        return
    listening = ask(sessions[:1], {"ask": "listen", "port": port, "word": word})[0]
    heard: Sequence[Mapping[str, Any]] = ()
    if "error" not in listening:
        heard = ask(sessions[1:], {"ask": "connect", "address": address, "port": port})
    yield from judge_port([one.host for one in asked], address, port, listening, heard, word)


def _share(asked: Sequence[Asked], sessions: Sequence[Session], run: Path) -> Iterator[Check]:
    """Every host writes a file where the run will lie, and looks for those of the others."""
    word = secrets.token_hex(16)
    names = [f".launch-check-{word}-{number}" for number in range(len(asked))]
    question = {"word": word, "run": str(run), "folder": asked[0].facts["run"], "names": names}
    wrote = ask(sessions, {"ask": "write", **question}, [{"name": name} for name in names])
    seen = ask(sessions, {"ask": "look", **question})
    folders = [one.facts["run"] for one in asked]
    yield from judge_folder([one.host for one in asked], folders, wrote, seen, names)


def _programs() -> Iterator[Check]:
    """What starts the ranks: pdsh, and the deepspeed of this very Python."""
    if shutil.which("pdsh") is None:
        yield Check(
            "FAIL", "pdsh", "must be in PATH: deepspeed reaches the hosts with it; install your system's package"
        )
    found = shutil.which("deepspeed")
    if found is None or Path(found).parent != Path(sys.executable).parent:
        what = f"is {found}" if found else "is not in PATH"
        must = f"must be that of {Path(sys.executable).parent}, whose Python was asked for here"
        yield Check("warn", "deepspeed", f"{must}; the one that a shell would start {what}")


def _table(asked: Sequence[Asked], wanted: Needs) -> None:
    """One row a host: what it gets of an update, and what it has."""
    rows: list[tuple[str, ...]] = [
        ("host", "ranks", "samples", "tokens", "micro-batches", "GPUs", "cores", "memory", "disk", "clock")
    ]
    for one in asked:
        share, ranks, facts = wanted.shares[one.host.name], one.host.ranks, one.facts
        told = ["?"] * 5
        if one.usable:
            gpus = "?" if isinstance(facts["gpus"], str) else str(len(facts["gpus"]))
            room = shown_bytes(facts["memory"]["free"]), shown_bytes(facts["free"])
            told = [gpus, str(facts["cores"]), *room, f"{one.clock[0]:+.2f} s" if one.clock else "?"]
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        micros = f"{share.micros} a rank"
        rows.append((one.host.name, span, f"{share.samples:,}", f"{share.tokens:,}", micros, *told))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        print(f"{first[0]:{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest), sep="  ")


def _arriving(exported: Mapping[str, Export]) -> str:
    """Names and where they come from; values may be secrets."""
    return ", ".join(f"{one.name} ({one.source})" for one in exported.values())


def _show(lines: Sequence[Check], verdict: str) -> None:
    """Prints the lines and raises for the first FAIL. What hosts and files told must not move the cursor."""
    for line in lines:
        text = f"{line.level:4}  {line.name:12} {line.text}"
        print("".join(character if character.isprintable() else "?" for character in text), flush=True)
    failed = [line for line in lines if line.level == "FAIL"]
    if failed:
        names = ", ".join(dict.fromkeys(line.name for line in failed))
        raise failed[0].error(f"{verdict}: {names}")

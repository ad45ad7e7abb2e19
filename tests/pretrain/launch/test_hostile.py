"""Hostfiles, variables, folders and words that want a shell: each is refused by name, and nothing is ever started.

`ssh` and `pdsh` are programs that leave a canary, too: what is refused must not even be tried.
"""

import os
import sys
from pathlib import Path

import pytest

from pretrain.__main__ import main
from tests.pretrain.runs import make_data, write_config

ROW = "hostile hostfile, environment, path, YAML, checkpoint or shard"

HOSTS = {
    "option with a command": "-oProxyCommand=touch${{IFS}}{canary} slots=8",
    "option with tabs": "-oProxyCommand=touch\t{canary} slots=8",
    "option in capitals": "-OPROXYCOMMAND=x slots=1",
    "option file": "-F{canary} slots=1",
    "local command": "-oPermitLocalCommand=yes slots=1",
    "two dashes": "-- slots=1",
    "substitution": "$(touch${{IFS}}{canary}) slots=1",
    "braces": "${{IFS}} slots=1",
    "backticks": "`touch${{IFS}}{canary}` slots=1",
    "semicolon": "n1;touch${{IFS}}{canary} slots=1",
    "ampersand": "n1&touch{canary} slots=1",
    "pipe": "n1|touch{canary} slots=1",
    "redirection": "n1>{canary} slots=1",
    "quote": "n1' slots=1",
    "double quote": 'n1" slots=1',
    "backslash": "n1\\ slots=1",
    "comma": "n1,-oProxyCommand=x slots=1",
    "list of pdsh": "n[1-99999] slots=1",
    "file of pdsh": "^{canary} slots=1",
    "pattern of pdsh": "/n.*/ slots=1",
    "excluded by pdsh": "-n1 slots=1",
    "module of pdsh": "exec:n1 slots=1",
    "user": "root@n1 slots=1",
    "user with an option": "-l@n1 slots=1",
    "port": "n1:22 slots=1",
    "uri": "ssh://n1 slots=1",
    "percent of ssh": "%h slots=1",
    "zone": "fe80::1%eth0 slots=1",
    "brackets": "[::1] slots=1",
    "slash": "../n1 slots=1",
    "star": "* slots=1",
    "tilde": "~root slots=1",
    "hash": "n1#x slots=1",
    "equals": "A=1 slots=1",
    "wide digits": "n1 slots=\uff11",
    "no slots": "n1",
    "empty slots": "n1 slots=",
    "zero": "n1 slots=0",
    "negative": "n1 slots=-8",
    "enormous": "n1 slots=99999999999999999999",
    "many": "n1 slots=1000000",
    "fraction": "n1 slots=1.5",
    "sum": "n1 slots=1+1",
    "command as slots": "n1 slots=8;touch{canary}",
    "substitution behind": "n1 slots=8 $(touch {canary})",
    "command behind": "n1 slots=8 ; touch {canary}",
    "max_slots": "n1 slots=8 max_slots=8",
    "other order": "slots=8 n1",
    "twice": "n1 slots=1\nn1 slots=2",
    "twice in capitals": "n1 slots=1\nN1 slots=2",
    "one address in two ways": "::1 slots=1\n0:0:0:0:0:0:0:1 slots=1",
    "not ASCII": "nödé slots=1",
    "lookalike": "n\u0456 slots=1",
    "right to left": "\u202en1 slots=1",
    "no width": "n1\u200b slots=1",
    "other space": "n1\u00a0slots=1",
    "nul": "n1\x00 slots=1",
    "escape": "\x1b[2Jn1 slots=1",
    "form feed": "n1\x0cslots=1",
    "behind a return": "# fine\r-oProxyCommand=x slots=1",
    "long": "n" * 64 + " slots=1",
    "very long": ".".join(["n" * 60] * 5) + " slots=1",
    "empty label": "n1..x slots=1",
    "dot": ". slots=1",
    "dash at the end": "n1- slots=1",
    "short address": "127.1 slots=1",
    "octal address": "010.0.0.1 slots=1",
    "hexadecimal address": "0x7f000001 slots=1",
    "number": "2130706433 slots=1",
    "address out of range": "256.0.0.1 slots=1",
    "nothing": "",
    "comments alone": "# n1 slots=1\n\n",
    "no UTF-8": b"n1\xff slots=1",
    "UTF-16": "n1 slots=1".encode("utf-16"),
}
WHOLE = ("nothing", "comments alone", "no UTF-8", "UTF-16")  # of which no single line is to blame
VALUES = {
    "substitution": "$(touch {canary})",
    "backticks": "`touch {canary}`",
    "variable": "$HOME",
    "braces": "${{X:=$(touch {canary})}}",
    "prompt": "${{PS1@P}}",
    "arithmetic": "$((x[$(touch {canary})]))",
    "quote": 'a"; touch {canary}; echo "b',
    "one quote": 'say "yes"',
    "backslash": "a b\\",
    "line": "a\ntouch {canary}",
    "return": "a\rtouch {canary}",
    "escape": "a \x1b[2J b",
    "right to left": "a \u202e b",
    "of pdsh": "rank-%n",
    "percent of pdsh": "100%%",
}
NAMES = ["NCCL X", "NCCL;touch${IFS}{canary}", "$(touch {canary})", "`x`", "NCCL-X", "1X", "a.b", "export X", "", "Ä"]
LINES = {
    "blank line": "A=1\n\nB=2\n",
    "blank line of spaces": "A=1\n   \n",
    "comment": "# threads\nA=1\n",
    "comment with a value": "# A=1\nB=2\n",
    "no value": "A\n",
    "command": "touch {canary}\n",
    "command with a value": "touch {canary} A=1\n",
    "behind a return": "A=1\r$(touch {canary})=2\n",
    "export": "export A=1\n",
    "no UTF-8": b"A=\xff\xfe\n",
}
WORDS = {
    "substitution": "name=$(touch${IFS}{canary})",
    "backticks": "name=`touch${IFS}{canary}`",
    "semicolon": "name=x;touch${IFS}{canary}",
    "ampersand": "name=x&&touch${IFS}{canary}",
    "pipe": "name=x|touch",
    "redirection": "name=x>{canary}",
    "substitution between spaces": "data.path=a $(touch {canary}) b",
    "escaped quote": 'data.path=a \\" ; touch {canary} ; \\" b',
    "line": "name=x\ntouch",
    "line between spaces": "data.path=a \n touch {canary}",
    "star": "data.path=*",
    "set": "objective.weights={ar:1,nar:2}",
    "tilde": "data.path=~/x",
    "quote": "data.path='x'",
    "double quote": 'data.path="x"',
    "hash": "data.path=#x",
    "bang": "name=!x",
    "of pdsh": "name=x%n",
}
FOLDERS = [
    "a b",
    "$(touch ${CANARY})",
    "a;touch canary",
    "`touch canary`",
    "a'b",
    'a"b',
    "a&b",
    "ä",
    "%n",
    "a\nb",
    "~",
    "#",
]
PYTHONS = [
    "/opt/my python/bin/python",
    "/opt/$(touch canary)/python",
    "/opt/a;b/python",
    "/opt/'/python",
    "/opt/%n/python",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("prepared")
    data = make_data(folder, 12)
    return write_config(folder, data), data


class Trap:
    """A place to start from, its canary, and `refused`: what `launch-check` says."""

    def __init__(self, folder: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.config, self.capsys = folder, config, capsys
        self.canary, self.hostfile = folder / "canary", folder / "hostfile"
        self.hostfile.write_text("n1 slots=1\nn2 slots=1\n")

    def refused(self, *words: str, code: int = 3) -> str:
        self.capsys.readouterr()
        given = ["launch-check", "--hostfile", str(self.hostfile), str(self.config), *words]
        assert main(given) == code
        captured = self.capsys.readouterr()
        assert captured.err.startswith("error: nothing was asked of the hosts: ")
        assert not self.canary.exists(), "something was executed"
        return captured.out


@pytest.fixture
def trap(
    tmp_path: Path,
    prepared: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Trap:
    programs, canary = tmp_path / "programs", tmp_path / "canary"
    programs.mkdir()
    for name in ("ssh", "pdsh", "deepspeed"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {canary}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("PYTHON", "NCCL"))]:
        monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Trap(tmp_path, prepared[0], capsys)


def as_bytes(content: str | bytes, canary: Path) -> bytes:
    return content if isinstance(content, bytes) else content.format(canary=canary).encode()


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("kind", HOSTS)
def test_a_hostfile(kind: str, trap: Trap) -> None:
    bad = as_bytes(HOSTS[kind], trap.canary)
    trap.hostfile.write_bytes(bad if kind in WHOLE else b"good slots=1\n" + bad + b"\n")
    told = trap.refused()
    lines = [line for line in told.splitlines() if line.startswith("FAIL")]
    assert all(" must " in line or "cannot be read" in line for line in lines)
    number = 2 + str(HOSTS[kind]).count("\n") + str(HOSTS[kind]).count("\r")
    assert lines[-1].startswith("FAIL  hostfile " if kind in WHOLE else f"FAIL  line {number}  ")
    assert all(line.isprintable() for line in told.splitlines())


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("where", ["shell", "home", "here"])
@pytest.mark.parametrize("kind", VALUES)
def test_a_value(kind: str, where: str, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    value = VALUES[kind].format(canary=trap.canary)
    if where == "shell":
        monkeypatch.setenv("PYTHON_NOTE", value)
    else:
        folder = Path.home() if where == "home" else Path.cwd()
        (folder / ".deepspeed_env").write_bytes(f"OMP_NUM_THREADS=1\nNCCL_NOTE={value}\n".encode())
    told = trap.refused()
    if "\n" in value or "\r" in value:
        assert "PYTHON_NOTE" in told or ".deepspeed_env line 3` must be NAME=value" in told
    else:
        assert f"FAIL  {'PYTHON_NOTE' if where == 'shell' else 'NCCL_NOTE'}" in told and "must" in told
    assert "touch" not in told, "a value may be a secret"


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("value", ["/bin; touch {canary}", "$(touch {canary})", "/a b", "/%n"])
def test_the_path_that_pdsh_sets(value: str, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSHPATH", value.format(canary=trap.canary))
    assert "FAIL  DSHPATH      must be of letters, digits" in trap.refused()


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_variable(name: str, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    name = name.replace("{canary}", str(trap.canary))
    Path(".deepspeed_env").write_text(f"A=1\n{name}=1\n", encoding="utf-8")
    monkeypatch.setenv(f"PYTHON{name} x", "1")
    told = trap.refused()
    assert ".deepspeed_env line 2` must begin with the name of a variable" in told
    assert "(this shell) must begin with the name of a variable" in told


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("kind", LINES)
def test_a_line_of_the_environment_file(kind: str, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ENV_FILE", "of-mine")
    Path("of-mine").write_bytes(as_bytes(LINES[kind], trap.canary))
    told = trap.refused()
    assert "FAIL  of-mine" in told and ("line " in told or "cannot be read" in told)


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("kind", WORDS)
def test_a_word_of_the_command(kind: str, trap: Trap) -> None:
    told = trap.refused(WORDS[kind].replace("{canary}", str(trap.canary)))
    assert any(line.startswith("FAIL  command") and " must " in line for line in told.splitlines())


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("name", FOLDERS)
def test_the_folder(name: str, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(name).mkdir()
    monkeypatch.chdir(name)
    told = trap.refused()
    assert "FAIL  folder       must be of letters, digits" in told


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_path_of_python(python: str, trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python)
    assert "FAIL  python       must be of letters, digits" in trap.refused()


@pytest.mark.fault(ROW)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "endless", "none"])
def test_what_is_no_file(kind: str, trap: Trap) -> None:
    trap.hostfile.unlink()
    if kind == "pipe":
        os.mkfifo(trap.hostfile)
    elif kind == "device":
        trap.hostfile.symlink_to("/dev/zero")
    elif kind == "folder":
        trap.hostfile.mkdir()
    elif kind == "endless":
        with trap.hostfile.open("wb") as file:
            file.truncate(1 << 40)
    assert "FAIL  hostfile     " in trap.refused()


def test_what_train_refuses_has_its_exit_code(trap: Trap) -> None:
    assert "FAIL  config       unknown key `optim.rate`" in trap.refused("optim.rate=1").replace(f"{trap.config}: ", "")
    assert "FAIL  config       data folder `nowhere`" in trap.refused("data.path=nowhere", code=4)
    assert main(["launch-check", "--hostfile", "h", "c", "--master_addr=-oProxyCommand=x"]) == 2
    assert main(["launch-check", "--hostfile", "h", "c", "--master_port", "70000"]) == 2

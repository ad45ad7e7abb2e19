"""What `launch-check` accepts arrives as it was, through deepspeed's own code, pdsh and a shell."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.launch import remote_shell
from pretrain.launch.hostfile import is_host, parse_hostfile

ROOT = Path(__file__).resolve().parents[3]
SHELL = "aZ0_@%+=:,./-${}()`'\"\\;&|<>*?[]!#~ \t\n\r\x07é\u202e"
TEXT = st.text(st.sampled_from(SHELL), max_size=12) | st.text(max_size=6).filter(lambda text: "\0" not in text)
FAIR = [
    "plain",
    "a b",
    "it's",
    "a;b",
    "x && y",
    "<in >out",
    "*",
    "[1-3]",
    "{a,b}",
    "~/x",
    "#1",
    "!x",
    "(a)",
    "é",
    "a\tb",
    "",
]


def runner(words: list[str], exports: dict[str, str]) -> tuple[list[str], Any]:
    """The words that deepspeed starts pdsh with."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    given = SimpleNamespace(
        user_args=words, user_script="pretrain", launcher_args="", master_addr="10.0.0.1", master_port=1, module=True,
        ssh_port=None, venv_script=None, no_python=False, no_local_rank=False, save_pid=False,
        enable_each_rank_log=None,
    )  # fmt: skip
    made = PDSHRunner(given, "e30=")
    for name, value in exports.items():
        made.add_export(name, value)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    return made.get_cmd(environment, {"n1": [0], "n2": [0]})[0], environment


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for Python on the hosts: prints its words and what begins with V as JSON."""
    path = tmp_path / "python"
    code = (
        "import json, os, sys; print(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if k[0] == 'V'}]))"
    )
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.chdir(ROOT)
    return path


def fine(value: str) -> bool:
    return not remote_shell.exports({"PYTHONV": value}, Path("/none"), Path("/none"), False)[1]


def test_words_and_values_through_a_shell(recorder: Path) -> None:
    @given(st.lists(TEXT, max_size=8), st.lists(TEXT, max_size=8))
    def arrives(values: list[str], words: list[str]) -> None:
        values = [value for value in [*values, *FAIR] if fine(value)]
        words = [word for word in [*words, *FAIR] if not remote_shell.check_words("/p", Path("/f"), [word])]
        exports = {f"V{number}": value for number, value in enumerate(values)}
        command, _ = runner(words, exports)
        line = " ".join(command[command.index("n1,n2") + 1 :]).replace("%n", "0")
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
        got_words, got_values = json.loads(done.stdout)
        assert got_words[-len(words) :] == words
        assert got_values == {name: value.strip() for name, value in exports.items()}

    arrives()
    assert all(map(fine, FAIR)), "people need these"


def test_through_pdsh_itself(recorder: Path, tmp_path: Path) -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != n1 ] && [ "$1" != n2 ]; do shift; done\nshift\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    values = {f"V{number}": value for number, value in enumerate([*FAIR, "100%", "50%p", "a%/b"])}
    assert all(map(fine, values.values()))
    command, environment = runner(["train", "my file.yaml", "optim.lr=1e-4", "a=it's a;b"], values)
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(told) == {"n1", "n2"}, done
    for number, host in enumerate(("n1", "n2")):
        words, got = json.loads(told[host])
        assert words[-4:] == ["train", "my file.yaml", "optim.lr=1e-4", "a=it's a;b"]
        assert f"--node_rank={number}" in words
        assert got == {name: value.strip() for name, value in values.items()}


def test_the_slurm_launcher_starts_the_folder_of_the_program() -> None:
    from deepspeed.launcher.multinode_runner import SlurmRunner

    given = SimpleNamespace(
        user_args=["train", "a.yaml"], user_script="pretrain", launcher_args="", include="", exclude="", num_nodes=-1,
        num_gpus=-1, module=True,
    )  # fmt: skip
    made = SlurmRunner(given, "e30=", {"n1": 2, "n2": 2})
    made.add_export("PYTHONPATH", str(ROOT))
    words = made.get_cmd({}, {"n1": [0, 1], "n2": [0, 1]})
    start = ["srun", "-n", "4", f"--export=ALL,PYTHONPATH={ROOT}", sys.executable, "-u", "pretrain", "train", "a.yaml"]
    assert words == start, "the word --module is lost"
    done = subprocess.run(
        [*words[4:7], "--help"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "launch-check" in done.stdout, done.stderr


def test_what_deepspeed_exports_is_what_we_say() -> None:
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.launcher import runner as theirs

    assert tuple(theirs.EXPORT_ENVS) == remote_shell.PREFIXES
    assert CUDA_Accelerator.export_envs(None) == [remote_shell.ON_CUDA]
    assert theirs.DEEPSPEED_ENVIRONMENT_NAME == remote_shell.FILE
    assert [*theirs.DEEPSPEED_ENVIRONMENT_PATHS] == [str(Path.home()), "."]


LINE = st.tuples(
    st.sampled_from(["n1", "n2", "N1", "10.0.0.1", "::1", "a.b", "-x", "n,m", "#", ""]) | TEXT,
    st.sampled_from([" slots=", "\tslots=", " ", "slots="]),
    st.sampled_from(["1", "8", "0", "08", "x", ""]),
    st.sampled_from(["", " # why", " x", "\r"]),
).map("".join)


@given(st.lists(LINE, max_size=5))
def test_deepspeed_reads_the_same_hosts_from_what_is_accepted(lines: list[str]) -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    text = "\n".join(lines)
    hosts, problems = parse_hostfile(text)
    assert bool(problems) == any(line.level == "FAIL" for line in problems)
    if not problems:
        assert {host.name: host.slots for host in hosts} == dict(_parse_hostfile(text.splitlines(keepends=True)))
        assert all(is_host(host.name) for host in hosts)
        assert [rank for host in hosts for rank in host.ranks] == list(range(sum(host.slots for host in hosts)))


def test_lines_that_are_fine() -> None:
    text = (
        "# the cluster\n\n  node-1.example.org slots=8  # rack 1\r\n10.0.0.7\tslots=4\nfd00::1 slots=1\nA_b slots=256"
    )
    hosts, problems = parse_hostfile(text)
    assert not problems
    assert [(host.name, host.slots, host.first) for host in hosts] == [
        ("node-1.example.org", 8, 0), ("10.0.0.7", 4, 8), ("fd00::1", 1, 12), ("A_b", 256, 13)
    ]  # fmt: skip
    many = "".join(f"n{number} slots=1\n" for number in range(1025))
    assert [line.text for line in parse_hostfile(many)[1]] == ["must name at most 1024 hosts, it names 1025"]


def test_the_examples() -> None:
    hosts, problems = parse_hostfile((ROOT / "configs/cluster/hostfile").read_text())
    assert len(hosts) == 2 and not problems
    found, problems = remote_shell.read_environment(ROOT / "configs/cluster/deepspeed_env")
    assert [one.name for one in found] == ["OMP_NUM_THREADS", "HF_HUB_OFFLINE"] and not problems


def test_what_wins_and_what_is_told(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "A=home\nB=1\nRANK=0\n"), (here, "A=here\nHF_TOKEN=hf_x\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    variables = {"PYTHONPATH": "/x", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "PDSH_SSH_ARGS_APPEND": "-v"}
    found, problems = remote_shell.exports(variables, home, here, cuda=False)
    assert not problems
    assert {name: one.value for name, one in found.items()} == {
        "PYTHONPATH": f"{here}:/x", "A": "here", "B": "1", "RANK": "0", "HF_TOKEN": "hf_x"
    }  # fmt: skip
    assert remote_shell.exports(variables, home, here, cuda=True)[0]["NCCL_DEBUG"].source == "this shell"
    told = {line.name: line.text for line in remote_shell.warnings(variables, found)}
    assert "not exported by deepspeed" in told["NCCL_DEBUG, OMP_NUM_THREADS"]
    assert "set by deepspeed on every host" in told["RANK"] and "every user of the hosts sees it" in told["HF_TOKEN"]
    assert "this check does not" in told["PDSH_SSH_ARGS_APPEND"]
    assert not any("hf_x" in text for text in told.values())

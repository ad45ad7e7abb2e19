"""One host behind a stand-in for ssh: what is asked, how a host fails to answer, and that nothing is left on it."""

import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

from pretrain.__main__ import main
from pretrain.launch import ask as asking
from pretrain.launch import probe
from pretrain.launch.ask import ask, command, sessions
from tests.e2e.lives import free_port
from tests.pretrain.runs import make_data, write_config

# Drops the options, prints what profiles print, and runs the last word in a shell, as sshd does.
SSH = """\
#!/bin/sh
while [ "$1" != -- ]; do shift; done
case "$2" in
down) echo "ssh: connect to host down port 22: No route to host" >&2; exit 255;;
empty) exit 255;;
other) exec sh -c "exec /nowhere/python";;
old) echo "unknown option -P" >&2; exit 2;;
mute) exec sleep 60;;
noisy) exec cat /dev/zero;;
esac
echo "Welcome to $2"; echo "answer-0 {}"
exec sh -c "$3"
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("ssh", SSH), ("pdsh", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    return programs


def test_the_words_of_ssh() -> None:
    words = command("node-1", 2222)
    assert words[0] == "ssh" and words[-3:-1] == ["--", "node-1"] and "BatchMode=yes" in words
    assert words[words.index("-p") + 1] == "2222" and words[-1].startswith(f"exec {sys.executable} ")
    assert command("node-1", None)[-1] == command("node-2", 22)[-1], "what a host runs depends on nothing"


def test_hosts_that_do_not_answer(ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["down", "empty", "other", "old", "fine"]
    with sessions(names, None) as asked:
        told = dict(zip(names, ask(asked, {"ask": "clock"}), strict=True))
        assert abs(told.pop("fine")["time"] - time.time()) < 60
    assert {name: answer["error"] for name, answer in told.items()} == {
        "down": "not reachable: ssh: connect to host down port 22: No route to host",
        "empty": "not reachable: exit code 255",
        "other": f"deepspeed starts {sys.executable} on every host, it cannot be started there: "
        + told["other"]["error"].split("there: ")[1],
        "old": f"{sys.executable} ends there: unknown option -P",
    }
    assert "/nowhere/python" in told["other"]["error"]
    monkeypatch.setattr(asking, "PATIENCE", 0.3)
    monkeypatch.setattr(asking, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(asking, "LONGEST_ANSWER", 1 << 20)
    with sessions(["mute"], None) as asked:
        assert ask(asked, {"ask": "clock"})[0]["error"] == "no answer in 0.3 s"
    monkeypatch.setattr(asking, "PATIENCE", 60.0)
    with sessions(["noisy"], None) as asked:
        assert "bytes that are no answer" in ask(asked, {"ask": "clock"})[0]["error"]


def test_a_question_that_fails_is_an_answer(tmp_path: Path) -> None:
    with sessions([None], None) as asked:
        assert "KeyError" in ask(asked, {"ask": "nonsense"})[0]["error"]
        written = {"ask": "write", "run": str(tmp_path / "runs" / "tiny"), "name": ".probe", "word": "w"}
        assert ask(asked, written) == [{}]
        assert ask(asked, written)[0]["errno"] == 17, "what is there is never written over"
        assert (tmp_path / ".probe").stat().st_size == probe.PROBE_BYTES
        seen = {"ask": "look", "folder": str(tmp_path), "names": [".probe", ".other"], "word": "w"}
        assert ask(asked, seen) == [{"seen": [".probe"]}] and ask(asked, {**seen, "word": "x"}) == [{"seen": []}]
    assert list(tmp_path.iterdir()) == []


def test_whoever_answers_at_the_port() -> None:
    port = free_port()
    with sessions([None, None], None) as (first, second):
        assert "error" in ask([second], {"ask": "connect", "address": "127.0.0.1", "port": port})[0]
        assert ask([first], {"ask": "listen", "port": port, "word": "it is me"}) == [{}]
        for _ in range(2):
            answer = ask([second], {"ask": "connect", "address": "127.0.0.1", "port": port})[0]
            assert answer == {"heard": "it is me"}
        assert ask([second], {"ask": "listen", "port": port, "word": ""})[0]["error"] == "Address already in use"


def test_the_whole_of_it_on_one_host(
    ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, make_data(tmp_path, 12))
    hostfile, port = tmp_path / "hostfile", free_port()
    hostfile.write_text("fine slots=2 # the only one\n")
    words = ["launch-check", "--hostfile", str(hostfile), str(config), "train.steps=3", "--master_port", str(port)]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(words) == 0
    told = capsys.readouterr().out
    header, row = (line.split() for line in told.splitlines()[2:4])
    assert header[:5] == ["host", "ranks", "samples", "tokens", "micro-batches"]
    assert row[:3] == ["fine", "0-1", "6"] and "PYTHONPATH (deepspeed)" in told
    assert "warn  fine         is the only host" in told and "ok    hosts        1 have the same code" in told
    assert told.endswith(f"--module pretrain train {config} train.steps=3\n")
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left"

    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        assert main(words) == 3
        captured = capsys.readouterr()
        assert f"FAIL  fine         port {port} cannot be used: Address already in use" in captured.out
        assert captured.err == "error: training cannot start on these hosts until this is right: fine\n"
    assert main([*words, f"runs={tmp_path / 'data' / 'manifest.json'}"]) == 0, "a folder above it is there"
    hostfile.write_text("down slots=1\nfine slots=1\n")
    capsys.readouterr()
    assert main(words) == 3
    told = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines()[3:5]}
    assert rows["down"][0] == "0" and rows["down"][-5:] == ["?"] * 5 and rows["fine"][0] == "1"
    assert "FAIL  down         not reachable: ssh: connect to host down port 22: No route to host" in told
    shutil.rmtree(ssh)
    monkeypatch.setenv("PATH", "")
    assert main(words) == 3
    assert "FAIL  pdsh         must be in PATH" in capsys.readouterr().out

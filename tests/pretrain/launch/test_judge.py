"""Every problem that a host can have is a line that names the host, the thing, what it must be and what it is."""

from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.cost.memory import Memory
from pretrain.errors import ConfigError, DataError, DiskError
from pretrain.launch.hostfile import Host
from pretrain.launch.judge import Asked, judge_folder, judge_hosts, judge_port
from pretrain.launch.needs import Needs
from pretrain.report.findings import Check

GB = 10**9
HOSTS = [Host("n1", 2, 0), Host("n2", 2, 2)]
NEEDS = Needs(
    settings=SimpleNamespace(data=SimpleNamespace(path="data/docs"), train=SimpleNamespace(keep=2)),  # type: ignore[arg-type]
    files=["a.yaml"],
    memory={"cpu": Memory({"weights": 2 * GB}), "cuda": Memory({"weights": 20 * GB}, {"optimizer": 3 * GB})},
    disk=5 * GB,
    shares={},
)
EXPORTS = {"PYTHONPATH": "/srv/parlance:/x"}


def facts(host: str, **other: Any) -> dict[str, Any]:
    return {
        "name": host,
        "machine": [host, "boot"],
        "python": "3.11.7",
        "shell": "bash",
        "folder": None,
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "code": {"pretrain/loop.py": "1", "pretrain/run.py": "2"},
        "files": {"a.yaml": "f"},
        "data": {"manifest": "m", "wrong": None},
        "run": "/shared/runs",
        "free": 50 * GB,
        "memory": {"total": 64 * GB, "free": 60 * GB},
        "cores": 8,
        "gpus": [],
        "own": "10.0.0.1",
        **other,
    }


def lines(clock: tuple[float, float] = (0.0, 0.1), first: dict[str, Any] | None = None, **other: Any) -> list[Check]:
    """What is said where the second host has `other` facts."""
    asked = [Asked(HOSTS[0], facts("n1", **(first or {})), (0.0, 0.1)), Asked(HOSTS[1], facts("n2", **other), clock)]
    return list(judge_hosts(asked, facts("login"), NEEDS, EXPORTS))


def test_hosts_that_are_alike() -> None:
    assert lines() == []


@pytest.mark.parametrize(
    ("other", "text", "error"),
    [
        ({"shell": "tcsh"}, "the login shell must be sh or another that knows `export`", ConfigError),
        ({"folder": "No such file or directory"}, "`/srv/parlance` cannot be entered: No such file", ConfigError),
        ({"machine": ["n1", "boot"], "name": "n1"}, "must be another machine than n1", ConfigError),
        ({"python": "3.12.1"}, "python must be 3.11.7, as here, is 3.12.1", ConfigError),
        ({"packages": {"torch": "2.13.0"}}, "deepspeed must be 0.19.8, as here, is not installed", ConfigError),
        ({"code": {"pretrain/loop.py": "9"}}, "`pretrain/loop.py` and 1 more files must be as here", ConfigError),
        ({"code": {}}, "`pretrain/loop.py` and 1 more files", ConfigError),
        ({"files": {"a.yaml": "g"}}, "`a.yaml` must be as here, is another one", ConfigError),
        ({"files": {"a.yaml": None}}, "`a.yaml` must be as here, is not there", ConfigError),
        ({"data": {"manifest": "x", "wrong": None}}, "`data/docs` must be the one that is here, is another", DataError),
        ({"data": {"manifest": None, "wrong": None}}, "has no manifest.json that can be read", DataError),
        ({"data": {"manifest": "m", "wrong": "a-000001.tar"}}, "`a-000001.tar` is missing or has", DataError),
        ({"free": 4 * GB}, "`/shared/runs` must have room for 3 checkpoints, 5 GB; 4 GB are free", DiskError),
        ({"memory": {"total": 3 * GB, "free": GB}}, "2 rank(s) must fit in its memory of 3 GB, need 4 GB", ConfigError),
        ({"gpus": "no CUDA"}, "torch cannot count the GPUs: no CUDA", ConfigError),
        ({"own": "127.0.1.1"}, "its own name n2 means 127.0.1.1 there", ConfigError),
        ({"own": None}, "its own name n2 means nothing there", ConfigError),
        ({"clock": (3.0, 0.2)}, "its clock is 3.0 s ahead of that of the first host", ConfigError),
        ({"clock": (-60.0, 0.2)}, "its clock is 60.0 s behind that of the first host", ConfigError),
    ],
)
def test_one_host_that_is_not(other: dict[str, Any], text: str, error: type[Exception]) -> None:
    first = {"gpus": [80 * GB] * 2} if other.get("gpus") else {}
    (line,) = lines(first=first, **other)
    assert (line.level, line.name, line.error) == ("FAIL", "n2", error) and text in line.text


def test_gpus() -> None:
    first = {"gpus": [80 * GB] * 2}
    assert lines(first=first, gpus=[80 * GB] * 8) == []
    assert "must have the 2 GPUs that the hostfile gives it, torch sees 1" in lines(first=first, gpus=[80 * GB])[0].text
    assert "torch sees 0" in lines(first=first)[0].text
    assert "must fit in a GPU of 16 GB, needs 20 GB" in lines(first=first, gpus=[16 * GB] * 2)[0].text
    small = {"total": 5 * GB, "free": 5 * GB}  # for what is offloaded
    assert "need 6 GB" in lines(first=first, gpus=[80 * GB] * 2, memory=small)[0].text


def test_what_only_warns_or_is_a_slow_way_to_ask() -> None:
    (line,) = lines(cores=1)
    assert (line.level, line.text) == ("warn", "2 ranks share 1 core(s)")
    assert lines(clock=(5.0, 4.0)) == [], "the answer took eight seconds"
    asked = [Asked(HOSTS[0], {"error": "not reachable: No route to host"})]
    (line,) = judge_hosts(asked, facts("login"), NEEDS, EXPORTS)
    assert (line.name, line.text) == ("n1", "not reachable: No route to host")


def test_the_port() -> None:
    def said(listening: dict[str, Any], *heard: dict[str, Any]) -> list[tuple[str, str]]:
        return [(x.name, x.text) for x in judge_port(HOSTS, "10.0.0.1", 2000, listening, heard, "word")]

    assert said({}, {"heard": "word"}) == []
    ((name, text),) = said({"error": "Address already in use"})
    assert name == "n1" and "port 2000 cannot be used: Address already in use" in text
    ((name, text),) = said({}, {"error": "Connection refused"})
    assert name == "n2" and "cannot reach n1 at 10.0.0.1 port 2000: Connection refused" in text
    ((name, text),) = said({}, {"heard": "SSH-2.0"})
    assert name == "n2" and "10.0.0.1 port 2000 is not n1" in text


def test_the_folder_of_the_run() -> None:
    def said(wrote: list[dict[str, Any]], seen: list[list[str]]) -> list[tuple[str, str, type[Exception]]]:
        answers = [{"seen": names} for names in seen]
        found = judge_folder(HOSTS, ["/runs", "/other"], wrote, answers, ["a", "b"])
        return [(line.name, line.text, line.error) for line in found]

    assert said([{}, {}], [["a", "b"], ["a", "b"]]) == []
    for seen in ([["a"], ["b"]], [["a", "b"], ["b"]], [["a"], ["a", "b"]]):
        found = said([{}, {}], seen)
        assert any(name == "n2" and "must be one folder for all" in text for name, text, _ in found), seen
    full = {"error": "No space left on device", "errno": 28}
    (line,) = said([{}, full], [["a"], ["a"]])
    assert line == ("n2", "`/other` cannot be written: No space left on device", DiskError)
    (line,) = said([{}, {"error": "Permission denied", "errno": 13}], [["a"], ["a"]])
    assert line[2] is ConfigError

"""`launch-check` over real ssh to hosts with networks of their own: alike, and with everything that can be wrong."""

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tests.cluster.conftest import Cluster
from tests.cluster.hosts import Hosts
from tests.pretrain.runs import ROOT

CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += 100;
    return code;
}
"""
WAITS = """
import socket, sys, time
waiting = socket.socket()
waiting.bind(("", int(sys.argv[1])))
waiting.listen()
print(flush=True)
time.sleep(600)
"""


def put_over(path: Path, text: str, folder: Path) -> str:
    """The shell command that makes `path` read `text` on one host alone."""
    copy = folder / f"other-{path.name}"
    copy.write_text(text)
    return f"mount --bind {copy} {path}"


def test_three_hosts_that_are_alike(cluster: Cluster, tmp_path: Path) -> None:
    cluster.hostfile.write_text("# in the order of ranks\nn2 slots=1\nhead slots=2\nn1 slots=1\n")
    before = sorted(cluster.folder.rglob("*"))
    with Hosts(tmp_path, ["head", "n1", "n2"]) as hosts:
        code, told = cluster.check(hosts)
    assert code == 0, told
    lines = told.splitlines()
    assert [line.split()[:2] for line in lines[3:6]] == [["n2", "0"], ["head", "1-2"], ["n1", "3"]]
    assert sum(int(line.split()[2]) for line in lines[3:6]) == 6, "samples of an update"
    assert "OMP_NUM_THREADS (" in told and "ok    hosts        3 have the same code" in told and "FAIL" not in told
    assert sorted(cluster.folder.rglob("*")) == before, "nothing is left"


def test_all_that_can_be_wrong_at_once(cluster: Cluster, tmp_path: Path) -> None:
    """One host each: down; another revision and version; a full run folder of its own; a clock that is off."""
    cluster.hostfile.write_text("".join(f"{name} slots=1\n" for name in ("head", "down", "code", "disk", "late")))
    (cluster.folder / "runs").mkdir(exist_ok=True)
    version = Path(
        str(metadata.distribution("pydantic").locate_file("")), f"pydantic-{metadata.version('pydantic')}.dist-info"
    )
    older = (version / "METADATA").read_text().replace(f"\nVersion: {metadata.version('pydantic')}", "\nVersion: 1.0.0")
    loop = ROOT / "pretrain" / "loop.py"
    hidden = cluster.folder / "runs"
    mounts = {
        "code": [put_over(loop, loop.read_text() + "\n", tmp_path), put_over(version / "METADATA", older, tmp_path)],
        "disk": [
            f"mount -t tmpfs -o size=64k tmpfs {hidden}",
            f"dd if=/dev/zero of={hidden}/full bs=1k count=60 2>/dev/null",
            f"mount -t tmpfs tmpfs {cluster.data}",
        ],
    }
    variables = {}
    if shutil.which("gcc"):
        (tmp_path / "clock.c").write_text(CLOCK)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "clock.so", tmp_path / "clock.c"], check=True)
        variables["late"] = {"LD_PRELOAD": str(tmp_path / "clock.so")}
    with Hosts(tmp_path, ["head", "down", "code", "disk", "late"], mounts, variables) as hosts:
        hosts.kill("down")
        holder = cluster.start(hosts, sys.executable, "-c", WAITS, "29871")
        assert holder.stdout is not None and holder.stdout.readline()
        code, told = cluster.check(hosts)
    holder.communicate()  # it has ended with its host
    assert code == 3, told
    for name, text in (
        ("down", "not reachable: ssh: connect to host down port 22: "),
        ("code", "`pretrain/loop.py` must be as here: bring all hosts to the same revision"),
        ("code", f"pydantic must be {metadata.version('pydantic')}, as here, is 1.0.0"),
        ("disk", "has no manifest.json that can be read"),
        ("disk", f"`{hidden}` must have room for 3 checkpoints"),
        ("disk", f"`{hidden}` cannot be written: No space left on device"),
        ("disk", f"`{hidden}` must be one folder for all, disk and head see different ones"),
        ("head", "port 29871 cannot be used: Address already in use"),
        *([("late", "its clock is 100.0 s ahead of that of the first host")] if variables else []),
    ):
        found = [line for line in told.splitlines() if line.startswith(f"FAIL  {name:12} ") and text in line]
        assert len(found) == 1, f"{name}: {text}\n{told}"
    fails = [line for line in told.splitlines() if line.startswith("FAIL")]
    assert len(fails) == 8 + len(variables), told

"""A private Slurm of a few nodes on this machine; tests skip with a reason where that cannot be.

Each node is a slurmd in namespaces of its own: it has a name, and `kill` takes all its processes, as when a host dies.
"""

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "unshare")
PATIENCE = 400.0  # seconds after which something is stuck, on a busy machine too
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
CONF = """
ClusterName=parlance
SlurmctldHost=head(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=15
KillWait=10
MinJobAge=3600
ReturnToService=2
PropagateResourceLimits=NONE
FirstJobId={first_job}
{more}
"""


class Slurm:
    """n1, n2, ... of four cores each, one partition. Nothing in it outlives `stop`."""

    def __init__(self, root: Path, nodes: int = 2, more: str = "") -> None:
        """more: lines of slurm.conf."""
        self.root, self.nodes = root, [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        self.environment |= {"SLURM_CONF": str(root / "slurm.conf"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.environment.pop("PYTHONPATH", None)  # a job brings its own code
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        port, *ports = _free_ports(1 + nodes)
        # Ports of the ranks follow from the number of the job: another session on this machine has other ones.
        first_job = random.randrange(1, 2**24)
        lines = CONF.format(root=root, port=port, first_job=first_job, more=more).splitlines()
        for place, (node, node_port) in enumerate(zip(self.nodes, ports, strict=True), 11):
            address = f"NodeAddr=127.0.0.{place} Port={node_port}"
            lines.append(f"NodeName={node} NodeHostname={node} {address} CPUs=4 RealMemory=1000")
        (root / "slurm.conf").write_text("\n".join([*lines, "PartitionName=main Nodes=ALL Default=YES", ""]))
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = ["127.0.0.1 localhost head", *(f"127.0.0.{place} {node}" for place, node in enumerate(self.nodes, 11))]
        (root / "hosts").write_text("\n".join([*hosts, ""]))
        (root / "munge.key").write_bytes(secrets.token_bytes(1024))
        (root / "munge.key").chmod(0o400)
        (root / "state").mkdir()

    def start(self) -> None:
        r = self.root
        files = [f"--{name}={r}/munge.{name[:4]}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        files[0] = f"--socket={r}/munge.sock"
        self._spawn("munged", [_path("munged"), "--foreground", "--force", f"--key-file={r}/munge.key", *files])
        self.wait_until((r / "munge.sock").exists, "munged")
        self._spawn("slurmctld", [*_isolated("head", r), _path("slurmctld"), "-D"])
        for node in self.nodes:
            self.start_node(node)
        self.wait_until(lambda: self.states() == ["idle"] * len(self.nodes), "idle nodes")

    def start_node(self, node: str) -> None:
        (self.root / "spool" / node).mkdir(parents=True, exist_ok=True)
        self._spawn(node, [*_isolated(node, self.root), _path("slurmd"), "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """The host dies: its slurmd and every process of every job there."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()

    def stop(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.call("scancel", "--user=root", timeout=10)
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGTERM if daemon is self._daemons.get("munged") else signal.SIGKILL)
        for daemon in self._daemons.values():
            daemon.wait(30)

    def states(self) -> list[str]:
        return sorted(self.call("sinfo", "--noheader", "--Node", "--format=%t").stdout.split())

    def call(self, *command: object, timeout: float = 60.0, **more: str) -> "subprocess.CompletedProcess[str]":
        words, env = [str(word) for word in command], self.environment | more
        return subprocess.run(words, env=env, cwd=self.root, capture_output=True, text=True, timeout=timeout)

    def submit(self, *arguments: object, **more: str) -> str:
        """The id of a new job."""
        done = self.call("sbatch", "--parsable", *arguments, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(";")[0].strip()

    def show(self, job: str) -> Mapping[str, str]:
        """`scontrol show job` of one job or one element of an array."""
        line = self.call("scontrol", "show", "job", "--oneliner", job).stdout
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait_for(self, job: str, states: Sequence[str] = ENDS, restarts: int = 0) -> Mapping[str, str]:
        """What Slurm says of the job once it is in one of `states`, after so many restarts at least."""
        found: Mapping[str, str] = {}

        def there() -> bool:
            nonlocal found
            found = self.show(job)
            return found.get("JobState") in states and int(found.get("Restarts", "0")) >= restarts

        self.wait_until(there, f"job {job} in {states}", lambda: f"{dict(found)}")
        return found

    def wait_until(self, there: Callable[[], bool], what: str, told: Callable[[], str] = str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not there():
            assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}: {told()} {self.log()}"
            time.sleep(0.2)

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.root.glob("*.log")))

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with (self.root / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    absent = [name for name in PROGRAMS if not shutil.which(_path(name))]
    if absent:
        return f"a private Slurm needs {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "a private Slurm needs root"
    tried = subprocess.run([*_isolated("n1", None), "true"], capture_output=True, text=True)
    return f"a private Slurm needs namespaces: {tried.stderr.strip()}" if tried.returncode else None


@contextlib.contextmanager
def private_slurm(nodes: int = 2, more: str = "") -> Iterator[Slurm]:
    """Skips the test where there can be no Slurm."""
    if problem := missing():
        pytest.skip(problem)
    # Sockets have names of 108 bytes at most.
    with tempfile.TemporaryDirectory(prefix="sl", dir="/tmp", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        slurm = Slurm(Path(folder), nodes, more)
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()


def _isolated(name: str, root: Path | None) -> list[str]:
    """Runs a command as the first process of a host `name`, which ends with it."""
    hosts = f"mount --bind {root}/hosts /etc/hosts && " if root else ""
    apart = [_path("unshare"), "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
    return [*apart, "sh", "-c", f'hostname {name} && {hosts}exec "$@"', "sh"]


def _path(program: str) -> str:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or program


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]

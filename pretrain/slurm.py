"""What Slurm tells a process: its job, and, where `srun` started several, who it is among the ranks."""

import re
import subprocess
from collections.abc import Mapping
from typing import Any

from pretrain.errors import ConfigError

# Below the ports that Linux gives to outgoing connections, above those of services.
FIRST_PORT, PORTS = 12_000, 20_000
SECONDS = 30.0  # that a command of Slurm may take


def job_id(environ: Mapping[str, str]) -> str | None:
    """`12`, or `12_3` for an element of a job array; None outside of a job."""
    array, element = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else environ.get("SLURM_JOB_ID")


def describe(environ: Mapping[str, str]) -> dict[str, Any]:
    """{"slurm": job, nodes and restarts} for env.json; empty outside of a job."""
    job = job_id(environ)
    if job is None:
        return {}
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    nodes = environ.get("SLURM_JOB_NODELIST")
    return {"slurm": {"job": job, "nodes": nodes, "restarts": int(restarts) if restarts.isdecimal() else None}}


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a task among several that `srun` started.

    Empty where another launcher has set them, and where nothing says that there are other tasks: in a batch script, in
    the shell of `salloc`, in a step of one task. An address or port that is set already stays.

    Raises:
        ConfigError: Slurm's variables are not what `srun` sets, or `scontrol` cannot name the nodes.
    """
    # A batch script and `salloc` have SLURM_NTASKS, too: of the allocation, whoever runs in it.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if ("RANK" in environ and "WORLD_SIZE" in environ) or "SLURM_PROCID" not in environ or tasks == "1":
        return {}
    rank, size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    local = _number(environ, "SLURM_LOCALID")
    if rank >= size:
        raise ConfigError(f"`SLURM_PROCID` must be below `SLURM_STEP_NUM_TASKS`, {size}, got {rank}")
    # Where each task was given a GPU of its own, it sees no other.
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    bound = "SLURM_GPUS_PER_TASK" in environ and visible != "" and "," not in visible
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": "0" if bound else str(local),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_node(environ),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_port(environ)),
    }


def is_running(job: str) -> bool | None:
    """Whether `job` may have processes, as Slurm knows it; None where there is nobody to ask."""
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
        return None
    answer = _ask("squeue", "--noheader", "--format=%T", "--jobs", job)
    if answer is None or (answer.returncode and "Invalid job id" not in answer.stderr):
        return None
    return any(state != "PENDING" for state in answer.stdout.split())


def _first_node(environ: Mapping[str, str]) -> str:
    """The node of rank 0."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    answer = _ask("scontrol", "show", "hostnames", nodes) if nodes and not nodes.startswith("-") else None
    if answer is None or answer.returncode or not answer.stdout.split():
        problem = "no answer" if answer is None else answer.stderr.strip() or "nothing"
        raise ConfigError(f"`scontrol show hostnames` must name the nodes `{nodes}`, got {problem}; or set MASTER_ADDR")
    return answer.stdout.split()[0]


def _port(environ: Mapping[str, str]) -> int:
    """The same on every rank; another one for each job of a node, and for the next start, if a stranger has it."""
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    restarts = _number({"SLURM_RESTART_COUNT": "0", **environ}, "SLURM_RESTART_COUNT")
    return FIRST_PORT + (job + 101 * step + 1009 * restarts) % PORTS


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise ConfigError(f"`{name}` must be a number, as `srun` sets it, got {text!r:.80}")
    return int(text)


def _ask(*command: str) -> "subprocess.CompletedProcess[str] | None":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None

"""What Slurm's variables make of a process."""

from pathlib import Path

import pytest

from pretrain import slurm
from pretrain.errors import ConfigError

# What srun sets for the second task of the first step of job 12 on two nodes (Slurm 22.05).
TASK = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_NODELIST": "n[1-2]",
}


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a program of Slurm print something and end with a code."""

    def answer(program: str, text: str, code: int = 0, error: str = "") -> None:
        path = tmp_path / program
        path.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nprintf %b "{text}"\necho "{error}" >&2\nexit {code}\n'
        )
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return answer


def test_a_task_of_srun_is_a_rank(answers, tmp_path: Path) -> None:
    answers("scontrol", "n1\\nn2\\n")
    found = slurm.rank_variables(TASK)
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "n1"}
    assert (tmp_path / "asked").read_text() == "show hostnames n[1-2]\n"
    assert 1024 < port < 32768, "below the ports of outgoing connections"
    assert int(slurm.rank_variables(TASK | {"SLURM_PROCID": "0"})["MASTER_PORT"]) == port
    for other in ({"SLURM_JOB_ID": "13"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}):
        assert int(slurm.rank_variables(TASK | other)["MASTER_PORT"]) != port, other


def test_what_the_user_sets_stays(answers) -> None:
    answers("scontrol", "", 1)
    found = slurm.rank_variables(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7777"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "7777")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-2]"},  # a shell of salloc
        {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        TASK | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1
        TASK | {"RANK": "0", "WORLD_SIZE": "1"},  # torchrun or deepspeed below srun
    ],
)
def test_a_world_of_its_own(environ: dict[str, str]) -> None:
    assert slurm.rank_variables(environ) == {}


def test_a_task_with_one_gpu_of_its_own_uses_the_one_it_sees(answers) -> None:
    answers("scontrol", "n1\\n")
    one = TASK | {"SLURM_LOCALID": "1", "SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0"}
    assert slurm.rank_variables(one)["LOCAL_RANK"] == "0"
    assert slurm.rank_variables(one | {"CUDA_VISIBLE_DEVICES": "0,1"})["LOCAL_RANK"] == "1"


@pytest.mark.fault("hostile hostfile, environment, path, YAML, checkpoint or shard")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_PROCID", "one"),
        ("SLURM_PROCID", "2"),
        ("SLURM_STEP_NUM_TASKS", "-2"),
        ("SLURM_LOCALID", "$(touch x)"),
        ("SLURM_JOB_ID", "1" * 5000),
        ("SLURM_STEP_NODELIST", "--help"),
        ("SLURM_RESTART_COUNT", "٣"),
    ],
)
def test_damaged_variables_are_named(name: str, value: str, answers) -> None:
    answers("scontrol", "n1\\n")
    with pytest.raises(ConfigError) as caught:
        slurm.rank_variables(TASK | {name: value})
    assert len(str(caught.value)) < 300 and (name in str(caught.value) or value in str(caught.value))


def test_without_scontrol_the_error_says_what_helps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"must name the nodes `n\[1-2\]`, got no answer; or set MASTER_ADDR"):
        slurm.rank_variables(TASK)


def test_a_job_and_its_facts() -> None:
    assert slurm.job_id({}) is None and slurm.describe({"SLURM_RESTART_COUNT": "3"}) == {}
    element = {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    assert slurm.job_id(element) == "12_3", "15 is the number of the array, too, if this is its last element"
    facts = {"SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "n[1-2]", "HF_TOKEN": "secret"}
    assert slurm.describe(element | facts) == {"slurm": {"job": "12_3", "nodes": "n[1-2]", "restarts": 2}}


def test_whether_a_job_runs(answers, tmp_path: Path) -> None:
    for states, running in (("RUNNING\\n", True), ("COMPLETING\\n", True), ("PENDING\\n", False), ("", False)):
        answers("squeue", states)
        assert slurm.is_running("12") is running, states
    answers("squeue", "", 1, "slurm_load_jobs error: Invalid job id specified")
    assert slurm.is_running("12_3") is False
    answers("squeue", "", 1, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert slurm.is_running("12") is None
    (tmp_path / "asked").unlink()
    assert slurm.is_running("12; touch x") is None and slurm.is_running("--help") is None
    assert not (tmp_path / "asked").exists()

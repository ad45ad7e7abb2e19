"""Jobs under a real Slurm of two nodes: signalled, cancelled, hit, bereft of a host, and still one curve."""

import contextlib
import io
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pretrain.__main__ import main
from pretrain.launch import snapshot
from pretrain.runs import read_events
from tests.pretrain.runs import ROOT, make_data, scalars, write_config
from tests.slurm import Slurm, private_slurm

pytestmark = pytest.mark.timeout(3600)  # on a busy machine
STEPS = 100
SIGNALS = 12
TWO_NODES = ("--nodes", "2", "--gpus-per-node", "0", "--time", "30", "--signal-seconds", "60")
LONG = (f"train.steps={STEPS}", "train.save_every=5", "train.validate_every=0", "train.sample_every=0")
SECRETS = (
    "HF_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GITHUB_TOKEN",
    "OPENAI_API_KEY",
    "SLACK_TOKEN",
    "NCCL_API_KEY",
    "MASTER_PASSWORD",
    "SSH_PRIVATE_KEY",
)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with private_slurm() as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"), 150)


class Submitted:
    """A configuration in a folder, its script, and jobs of it."""

    def __init__(self, slurm: Slurm, folder: Path, data: Path, *arguments: str) -> None:
        self.slurm, self.folder, self.run = slurm, folder, folder / "runs" / "tiny"
        config, text = write_config(folder, data), io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(text):
            assert main(["slurm", str(config), *TWO_NODES, *LONG, *arguments]) == 0
        self.script = folder / "job.sbatch"
        self.script.write_text(text.getvalue())

    def submit(self, **more: str) -> str:
        return self.slurm.submit(self.script, **more)

    def wait_for_save(self, run: Path | None = None, after: int = 0) -> None:
        def saved() -> bool:
            return any(event["event"] == "save" for event in events(run or self.run)[after:])

        self.slurm.wait_until(saved, "a checkpoint", self.printed)

    def printed(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("runs/*/slurm-*.out"))

    def finished(self, job: str, restarts: int) -> None:
        """The job ends well after exactly so many restarts, with one curve."""
        found = self.slurm.wait_for(job)
        assert (found["JobState"], found["Restarts"]) == ("COMPLETED", str(restarts)), self.printed()
        assert_one_curve(self.run)


def events(run: Path) -> list[dict]:
    return read_events(run) if (run / "events.jsonl").exists() else []


def assert_one_curve(run: Path) -> None:
    assert [step for step, _ in scalars(run)["loss/total"]] == list(range(1, STEPS + 1))
    assert (run / "latest").read_text() == f"step-{STEPS:08d}\n" and events(run)[-1]["event"] == "finish"


def ranks(run: Path) -> dict[int, psutil.Process]:
    """{rank: process} of the living ranks that train in `run`."""
    found = {}
    for process in psutil.process_iter():
        try:
            if f"{run}/slurm/" in " ".join(process.cmdline()) and "srun" not in process.name():
                found[int(process.environ()["SLURM_PROCID"])] = process
        except (psutil.Error, KeyError):
            continue
    return found


@pytest.mark.fault("secrets planted in the environment", trials=len(SECRETS))
@pytest.mark.fault("signals in each phase", trials=1)
def test_a_signalled_job_requeues_itself_once(
    slurm: Slurm, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And runs the code it was submitted with, keeps a second job out, and tells no secrets."""
    checkout = tmp_path / "checkout"
    for package in ("pretrain", "kernels/parlance_kernels", "configs"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (checkout / "finetune").mkdir()
    monkeypatch.setattr(snapshot, "ROOT", checkout)
    submitted = Submitted(slurm, tmp_path, data)
    shutil.rmtree(checkout)
    planted = {name: f"planted-{number}-secret" for number, name in enumerate(SECRETS)}

    job = submitted.submit(**planted)
    submitted.wait_for_save()
    living = ranks(submitted.run)
    assert set(living) == {0, 1}
    for process in living.values():
        process.suspend()  # so that the run is not over before the second job is there
    second = submitted.submit()
    refused = slurm.wait_for(second)
    assert (refused["JobState"], refused["ExitCode"], refused["Restarts"]) == ("FAILED", "5:0", "0")
    told = (submitted.run / f"slurm-{second}.out").read_text()
    assert "must be used by one job at a time, is in use by host n1 pid" in told and f"job {job}" in told

    assert slurm.call("scancel", "--batch", "--signal=USR1", job).returncode == 0
    for process in living.values():
        process.resume()
    submitted.finished(job, restarts=1)
    assert Counter(event["event"] for event in events(submitted.run) if event["event"] != "save") == {
        "start": 1,
        "stop": 1,
        "resume": 1,
        "finish": 1,
    }
    begun = [event for event in events(submitted.run) if event["event"] in ("start", "resume")]
    assert [event["ranks"] for event in begun] == [2, 2]
    assert [event["slurm"] for event in begun] == [
        {"job": job, "nodes": "n[1-2]", "restarts": restarts} for restarts in (0, 1)
    ]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert [name for name, value in planted.items() if value.encode() in written] == []


@pytest.mark.fault("signals in each phase", trials=1)
def test_an_element_of_an_array_is_requeued_alone(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    submitted = Submitted(slurm, tmp_path, data, "--seeds", "1,2", "--nodes", "1")
    job, runs = submitted.submit(), [tmp_path / "runs" / f"tiny-seed{seed}" for seed in (1, 2)]
    submitted.wait_for_save(runs[1])
    slurm.call("scancel", "--signal=USR1", f"{job}_2")  # the ranks themselves, not the batch shell
    for seed, restarts in ((1, 0), (2, 1)):
        found = slurm.wait_for(f"{job}_{seed}")
        assert (found["JobState"], found["Restarts"]) == ("COMPLETED", str(restarts)), submitted.printed()
        assert_one_curve(runs[seed - 1])
    first, second = (scalars(run)["loss/total"] for run in runs)
    assert first != second


@pytest.mark.slow
@pytest.mark.fault("kill of one rank", trials=3)
def test_a_job_with_a_killed_rank_comes_back(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    submitted = Submitted(slurm, tmp_path, data)
    job = submitted.submit()
    for life, rank in enumerate((1, 0, 1)):
        submitted.wait_for_save(after=len(events(submitted.run)))
        ranks(submitted.run)[rank].kill()
        killed = time.monotonic()
        slurm.wait_until(lambda: not ranks(submitted.run), "the end of the other rank", submitted.printed)
        assert time.monotonic() - killed < 60
        slurm.wait_for(job, ["RUNNING", "COMPLETED"], restarts=life + 1)
    submitted.finished(job, restarts=3)


@pytest.mark.slow
@pytest.mark.fault("death of a host under Slurm", trials=5)
def test_a_job_outlives_its_hosts(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    submitted = Submitted(slurm, tmp_path, data)
    job = submitted.submit()
    for life, node in enumerate(("n2", "n1", "n2", "n1", "n2")):  # n1 has the batch script and rank 0
        submitted.wait_for_save(after=len(events(submitted.run)))
        slurm.kill_node(node)
        slurm.wait_until(lambda: not ranks(submitted.run), "the end of the other rank", submitted.printed)
        slurm.start_node(node)
        slurm.wait_for(job, ["RUNNING", "COMPLETED"], restarts=life + 1)
    submitted.finished(job, restarts=5)


@pytest.mark.slow
@pytest.mark.fault("signals in each phase", trials=SIGNALS)
def test_signals_at_any_moment_of_a_job(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    """From the script's first lines over imports and set-up to updates and saves: one requeue each."""
    submitted = Submitted(slurm, tmp_path, data, "--restarts", "50", "train.steps=100000")
    job = submitted.submit()
    for life in range(SIGNALS):
        slurm.wait_for(job, ["RUNNING"], restarts=life)
        time.sleep(random.uniform(0.0, 12.0))
        slurm.call("scancel", "--batch", f"--signal={('USR1', 'TERM')[life % 2]}", job)
        slurm.wait_for(job, ["PENDING", "RUNNING"], restarts=life + 1)
    submitted.wait_for_save(after=len(events(submitted.run)))
    assert slurm.show(job)["Restarts"] == str(SIGNALS), submitted.printed()
    slurm.call("scancel", job)
    slurm.wait_until(lambda: not ranks(submitted.run), "the end of the ranks", submitted.printed)
    steps = [step for step, _ in scalars(submitted.run)["loss/total"]]
    assert steps == list(range(1, len(steps) + 1)), "one curve"


@pytest.mark.slow
@pytest.mark.fault("signals in each phase", trials=1)
def test_the_end_of_its_time_is_a_requeue(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    """Slurm may send the signal a minute early."""
    submitted = Submitted(slurm, tmp_path, data, "--time", "3", "--signal-seconds", "60", "train.steps=100000")
    job = submitted.submit()
    slurm.wait_for(job, ["RUNNING"], restarts=1)
    stopped = [event for event in events(submitted.run) if event["event"] != "save"]
    assert [event["event"] for event in stopped[:2]] == ["start", "stop"], submitted.printed()
    slurm.call("scancel", job)


@pytest.mark.parametrize("more", ["", pytest.param("RequeueExit=85", marks=pytest.mark.slow)])
def test_cancelled_is_cancelled(more: str, data: Path, tmp_path: Path) -> None:
    """Slurm asks the ranks to end first, which save and end with 85: that must not bring the job back."""
    with private_slurm(1, more) as slurm:
        submitted = Submitted(slurm, tmp_path, data, "--nodes", "1")
        job = submitted.submit()
        submitted.wait_for_save()
        slurm.call("scancel", job)
        slurm.wait_until(lambda: not ranks(submitted.run), "the end of the ranks", submitted.printed)
        assert slurm.wait_for(job)["JobState"] == "CANCELLED" and slurm.show(job)["Restarts"] == "0"

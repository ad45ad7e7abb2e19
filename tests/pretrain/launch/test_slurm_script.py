"""The script of a Slurm job: what it asks for, how it ends, and that nothing from outside is ever run.

`srun`, `scontrol` and `squeue` are stood in for here; tests/e2e/test_slurm_jobs.py has the real ones.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.__main__ import main as finetune
from pretrain.__main__ import main
from pretrain.launch import snapshot
from tests.finetune.test_end_to_end import bundle_at
from tests.pretrain.runs import ROOT, make_data, write_config

BASH = shutil.which("bash")
NEEDED = ["--nodes", "2", "--gpus-per-node", "4", "--time", "12:00:00"]
HOSTILE = "hostile hostfile, environment, path, YAML, checkpoint or shard"
SRUN = """#!/bin/sh
echo "srun $*" >> "$HERE/called"
trap 'echo USR1 >> "$HERE/signalled"; exit 85' USR1
[ "$SAVES" ] && date +%N > "$HERE/runs/tiny/latest"
touch "$HERE/started"
i=0; while [ "$CODE" = wait ] && [ $i -lt 1200 ]; do /bin/sleep 0.1; i=$((i + 1)); done
exit $CODE
"""
SCONTROL = '#!/bin/sh\necho "scontrol $*" >> "$HERE/called"\nexit ${FAILS:-0}\n'
SQUEUE = """#!/bin/sh
[ "$TERMED" ] && [ ! -e "$HERE/termed" ] && touch "$HERE/termed" && kill -TERM $$
echo "$STATE"
"""

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"), 20)


@pytest.fixture
def here(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to submit from, with tiny.yaml; copies of the code are a line long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(snapshot, "code", lambda: {"pretrain/__main__.py": b"code\n"})
    write_config(tmp_path, data)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE), ("sleep", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return tmp_path


@pytest.fixture
def job(here: Path, capsys: pytest.CaptureFixture[str]):
    """Makes a script, returns its text."""

    def make(*arguments: object, config: object = "tiny.yaml") -> str:
        capsys.readouterr()
        assert main(["slurm", str(config), *NEEDED, *map(str, arguments)]) == 0
        text = capsys.readouterr().out
        checked = subprocess.run([str(BASH), "-n"], input=text, capture_output=True, text=True)
        assert checked.returncode == 0 and not checked.stderr, checked.stderr
        return text

    return make


def environment(here: Path, **settings: str) -> dict[str, str]:
    path = f"{here / 'bin'}:/usr/bin:/bin"
    return {"PATH": path, "HERE": str(here), "SLURM_JOB_ID": "7", "CODE": "0", "STATE": "RUNNING None"} | settings


def run(text: str, here: Path, **settings: str) -> tuple[int, list[str], str]:
    """The exit code of the script, what it called, what it printed."""
    (here / "called").unlink(missing_ok=True)
    (here / "job.sbatch").write_text(text)
    env = environment(here, **settings)
    command = [str(BASH), str(here / "job.sbatch")]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=120)
    called = (here / "called").read_text().splitlines() if (here / "called").exists() else []
    return done.returncode, called, done.stdout + done.stderr


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.lstrip().startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def test_it_asks_for_what_was_given(job, here: Path) -> None:
    told = ["--partition", "gpu", "--account", "me", "--signal-seconds", "120", "--sbatch", "mem=0", "train.steps=9"]
    assert directives(job(*told)) == {
        "job-name": "tiny",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "1",
        "time": "12:00:00",
        "partition": "gpu",
        "account": "me",
        "output": f'"{here}/runs/tiny/slurm-%j.out"',
        "open-mode": "append",
        "signal": "B:USR1@120",
        "mem": "0",
        "requeue": "",
    }


def test_on_cpus_there_is_a_rank_a_node_with_its_workers(job) -> None:
    found = directives(job("--gpus-per-node", "0", "data.workers=3"))
    assert "gpus-per-node" not in found and found["ntasks-per-node"] == "1" and found["cpus-per-task"] == "4"
    assert directives(job("data.workers=3", "--cpus-per-task", "9"))["cpus-per-task"] == "9"


def test_code_and_configuration_are_copied_when_the_script_is_made(job, here: Path, monkeypatch) -> None:
    job("train.steps=9")
    (copy,) = (here / "runs" / "tiny" / "slurm").iterdir()
    assert (copy / "pretrain" / "__main__.py").read_text() == "code\n"
    assert "steps: 9" in (copy / "config.yaml").read_text()
    job("train.steps=9")
    assert list((here / "runs" / "tiny" / "slurm").iterdir()) == [copy], "the same again needs no other copy"
    monkeypatch.setattr(snapshot, "code", lambda: {"pretrain/__main__.py": b"changed\n"})
    text = job("train.steps=9")
    assert (copy / "pretrain" / "__main__.py").read_text() == "code\n"
    (other,) = {*(here / "runs" / "tiny" / "slurm").iterdir()} - {copy}
    assert other.name in text and (other / "pretrain" / "__main__.py").read_text() == "changed\n"


def test_the_copy_holds_whatever_training_needs(tmp_path: Path) -> None:
    files = snapshot.code()
    snapshot.write(tmp_path / "copy", files)
    assert not any("__pycache__" in name for name in files)
    names = ["pretrain.train", "finetune.train", "parlance_kernels"]
    code = f"from importlib.util import find_spec; print(*(find_spec(name).origin for name in {names}))"
    env = os.environ | {"PYTHONPATH": f"{tmp_path}/copy:{tmp_path}/copy/kernels", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [
        f"{tmp_path}/copy/pretrain/train.py",
        f"{tmp_path}/copy/finetune/train.py",
        f"{tmp_path}/copy/kernels/parlance_kernels/__init__.py",
    ], done.stderr


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 7])
def test_what_would_end_the_same_way_again_is_not_requeued(code: int, job, here: Path) -> None:
    ended, called, _ = run(job(), here, CODE=str(code))
    assert ended == code and [line.split()[0] for line in called] == ["srun"]


@pytest.mark.parametrize("code", [85, 1, 137, 143, 135, 255])
@pytest.mark.parametrize("state", ["RUNNING None", "COMPLETING TimeLimit", ""])
def test_anything_else_is_requeued_once(code: int, state: str, job, here: Path) -> None:
    ended, called, _ = run(job(), here, CODE=str(code), STATE=state)
    assert ended == 0, "never 85, or a site with RequeueExit=85 would do it once more"
    assert called[1:] == ["scontrol requeue 7"]
    copy = next(path for path in (here / "runs/tiny/slurm").iterdir() if path.is_dir())
    assert called[0].endswith(f"{sys.executable} -m pretrain train {copy}/config.yaml")


@pytest.mark.parametrize("state", ["COMPLETING None", "PENDING BeginTime", "PREEMPTED None"])
def test_what_slurm_ends_itself_stays_ended(state: str, job, here: Path) -> None:
    ended, called, printed = run(job(), here, CODE="85", STATE=state, TERMED="yes")
    assert (here / "termed").exists(), "Slurm ends what the script has started, too"
    assert ended == 1 and len(called) == 1 and f"Slurm ends this job itself ({state})" in printed


def test_a_controller_that_does_not_answer_is_asked_again_and_then_told_by_the_exit_code(job, here: Path) -> None:
    ended, called, _ = run(job(), here, CODE="85", FAILS="1")
    assert ended == 85 and called[1:] == ["scontrol requeue 7"] * 3


def test_starts_without_progress_come_to_an_end(job, here: Path) -> None:
    text = job("--restarts", "2")
    for _ in range(2):
        assert run(text, here, CODE="137")[:1] == (0,)
    ended, called, printed = run(text, here, CODE="137")
    assert (ended, len(called)) == (137, 1) and "3 starts in a row got no further than nothing" in printed
    assert run(text, here, CODE="85")[0] == 1
    assert run(text, here, CODE="137", SLURM_JOB_ID="8")[0] == 0, "another job has starts of its own"


def test_thirty_preemptions_are_no_failure(job, here: Path) -> None:
    text = job("--restarts", "0")
    for _ in range(30):
        ended, called, printed = run(text, here, CODE="85", SAVES="yes")
        assert (ended, called[1:]) == (0, ["scontrol requeue 7"]), printed


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_srun_as_usr1(sent: signal.Signals, job, here: Path) -> None:
    (here / "job.sbatch").write_text(job())
    process = subprocess.Popen([str(BASH), "job.sbatch"], env=environment(here, CODE="wait"), cwd=here)
    try:
        deadline = time.monotonic() + 60
        while not (here / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for _ in range(3):
            process.send_signal(sent)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert set((here / "signalled").read_text().split()) == {"USR1"}
    assert (here / "called").read_text().splitlines()[1:] == ["scontrol requeue 7"]


def test_seeds_are_an_array_of_runs(job, here: Path) -> None:
    text = job("--seeds", "3,11", "--at-once", "1")
    found = directives(text)
    assert found["array"] == "3,11%1" and found["output"] == f'"{here}/runs/tiny-seed%a/slurm-%A.out"'
    for seed in (3, 11):
        (config,) = (here / "runs" / f"tiny-seed{seed}" / "slurm").glob("*/config.yaml")
        assert f"name: tiny-seed{seed}\n" in config.read_text() and f"\nseed: {seed}\n" in config.read_text()
        element = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(seed), "SLURM_JOB_ID": "7"}
        _, called, _ = run(text, here, CODE="85", **element)
        assert called[0].endswith(f"train {config}") and called[1:] == [f"scontrol requeue 7_{seed}"], (
            "one element alone"
        )


def test_a_sweep_is_an_array_of_runs(job, here: Path) -> None:
    found = directives(job("--array", "optim.lr=1e-4 seed=5", "--array", "optim.lr=3e-4", "train.steps=9"))
    assert found["array"] == "1,2" and found["output"].endswith('runs/tiny-%a/slurm-%A.out"')
    first, second = (next((here / "runs" / f"tiny-{n}").glob("slurm/*/config.yaml")).read_text() for n in (1, 2))
    assert "lr: 0.0001\n" in first and "seed: 5\n" in first and "steps: 9\n" in first
    assert "lr: 0.0003\n" in second and "seed: 1\n" in second and "steps: 9\n" in second


def test_settings_of_deepspeed_travel_along(job, here: Path) -> None:
    (here / "ds.json").write_text('{"zero_optimization": {"overlap_comm": true}}')
    assert '--deepspeed_config "$copy/deepspeed_config"' in job("--deepspeed_config", "ds.json")
    (copy,) = (here / "runs/tiny/slurm").glob("*/deepspeed_config")
    assert "overlap_comm" in copy.read_text()


def test_tuning_has_the_same_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / "finetune" / "stdlib_summaries" / "ar.yaml"
    given = ["slurm", str(config), "bundle=bundles/b", "--seeds", "1,2", *NEEDED]
    assert finetune(given) == 5 and not (here / "runs").exists()
    (here / "bundles").mkdir()
    bundle_at(here / "bundles" / "b", ("ar", "nar"), "eos_first")
    assert finetune(given) == 0
    text = capsys.readouterr().out
    assert '"$python" -m finetune train "$copy/config.yaml"' in text and "--array=1,2" in text
    assert len(list(here.glob("runs/stdlib-summaries-ar-seed?/slurm/*/config.yaml"))) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["optim.lrr=1"], 3, "unknown key `optim.lrr`; did you mean `optim.lr`?"),
        (["objective.name=bert"], 3, "`objective.name` must be one of janus"),
        (["--array", "optim.lr=fast"], 3, "`optim.lr`"),
        (["--array", "name=x"], 2, "must leave `name` and `runs` alone"),
        (["--array", "a='"], 2, "must be key=value words"),
        (["--seeds", "1,1"], 2, "must be different numbers"),
        (["--seeds", "1", "--array", "seed=1"], 2, "not allowed with"),
        (["--at-once", "2"], 2, "must come with `--seeds` or `--array`"),
        (["--nodes", "0"], 2, "at least 1"),
        (["--signal-seconds", "43200"], 2, "must be less than `--time`, which is 43200"),
        (["--sbatch", "signal=B:USR2@1"], 2, "must leave `signal` to this command"),
        (["--sbatch", "qos"], 2, "must be KEY=VALUE"),
        (["--sbatch", "comment=two words"], 2, "must have a value without spaces and quotes"),
        (["data.path=none"], 4, "must come from a finished `prepare`"),
        (["engine.tensor_parallel=3"], 3, "must divide the number of ranks (8), got 3"),
        (["model.max_positions=8"], 3, "`model.max_positions` must be at least"),
        (["--deepspeed_config", "none.json"], 3, "none.json"),
        (["runs=tiny.yaml"], 3, "must be a folder to write into"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    arguments: list[str], code: int, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        ended = main(["slurm", "tiny.yaml", *NEEDED, *arguments])
    except SystemExit as error:
        ended = int(str(error.code))
    told = capsys.readouterr()
    assert ended == code and message in told.err and told.out == ""
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("time_", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-0", 172800), ("1-1:30", 91800), ("0-0:0:50", 50)],
)
def test_limits_are_read_as_slurm_reads_them(time_: str, seconds: int, here: Path) -> None:
    given = ["slurm", "tiny.yaml", "--nodes", "1", "--gpus-per-node", "1", "--time", time_, "--signal-seconds"]
    assert main([*given, str(seconds - 1)]) == 0 and main([*given, str(seconds)]) == 2


EVIL = (
    "$(touch pwned)",
    "`touch pwned`",
    "a; touch pwned",
    "a\n#SBATCH --wrap=pwned",
    "a\ntouch pwned",
    "a' ; touch pwned; '",
    'a" ; touch pwned; "',
    "a && touch pwned",
    "a | touch pwned",
    "\\\ntouch pwned",
    "a\rtouch pwned",
    "--wrap=touch pwned",
    "@FOLDER@ $(touch pwned)",
    "%j\\%%",
)


@pytest.mark.fault(HOSTILE)
@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("place", ["partition", "account", "sbatch", "time", "seeds", "array", "name"])
def test_hostile_words_are_refused(place: str, evil: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"sbatch": f"--sbatch=qos={evil}", "name": f"name={evil!r}", "array": f"--array=name={evil}"}
    before = set(here.rglob("*"))
    try:
        code = main(["slurm", "tiny.yaml", *NEEDED, words.get(place, f"--{place}={evil}")])
    except SystemExit as error:
        code = int(str(error.code))
    told = capsys.readouterr()
    assert code in (2, 3) and told.out == "" and set(here.rglob("*")) == before


@pytest.mark.fault(HOSTILE)
@pytest.mark.parametrize("evil", [word for word in EVIL if word.isprintable() and "/" not in word])
@pytest.mark.parametrize("place", ["config", "data", "folder", "python", "runs"])
def test_hostile_words_that_may_be_are_only_words(
    place: str, evil: str, job, here: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, config, settings = directives(job()), Path("tiny.yaml"), []
    shutil.rmtree(here / "runs")
    if place == "config":
        config = config.rename(f"{evil}.yaml")
    elif place == "data":
        (here / evil).symlink_to(data)
        settings = [f"data.path={json.dumps(evil)}"]
    elif place == "folder":
        (here / evil).mkdir()
        config.rename(here / evil / "tiny.yaml")
        monkeypatch.chdir(here / evil)
        config, settings = Path("tiny.yaml"), [f"runs={here}/runs"]
    elif place == "runs":
        assert main(["slurm", "tiny.yaml", *NEEDED, f"runs={evil!r}"]) == (0 if evil.startswith("--") else 3)
        assert not list(here.rglob("pwned"))
        return
    else:
        monkeypatch.setattr(sys, "executable", evil)
    text = job(*settings, config=f"./{config}")
    assert directives(text) == plain
    ended, called, printed = run(text, here, CODE="3")
    assert (ended, len(called)) == (3, 1), printed
    assert not list(here.rglob("pwned"))

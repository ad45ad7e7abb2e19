"""`doctor`: a healthy machine passes, and everything that can be wrong has its line, its advice and its exit code."""

import http.server
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from pretrain.__main__ import main
from pretrain.report import check_machine, check_software, doctor
from pretrain.report.findings import Check
from tests.pretrain.runs import ROOT, environment

Patch = pytest.MonkeyPatch
GB = 10**9


def only(check: Callable[[], Iterator[Check]]) -> Check:
    """The one line of a check."""
    (line,) = check()
    return line


def assert_line(line: Check, level: str, *parts: str) -> None:
    assert line.level == level, line
    assert all(part in line.text for part in parts), line


def test_a_healthy_machine(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    capsys.readouterr()
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert all(re.fullmatch(r"(ok  |warn)  \S+ +\S.*", line) for line in lines), lines
    names = ["python", "packages", "torch", "device", "kernels", "deepspeed", "gloo", "tensorboard", "apex", "cores",
             "memory", "disk", "port", "environment", "hub"]  # fmt: skip
    found = [line.split()[1] for line in lines]
    assert [name for name in found if name in names] == names and "error" not in captured.err


def test_what_keeps_training_from_starting_is_an_error_that_names_it(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[Check]:
        yield Check("ok", "first", "half of it works")
        raise RuntimeError("libcudart.so:\n  cannot open")

    def wrong() -> Iterator[Check]:
        yield Check("FAIL", "disk", "cannot be written")

    def slow() -> Iterator[Check]:
        yield Check("warn", "cores", "few")

    monkeypatch.setattr(doctor, "CHECKS", (broken, slow, wrong, check_software.kernels))
    capsys.readouterr()
    assert main(["doctor"]) == 3
    captured = capsys.readouterr()
    assert [line.split()[:2] for line in captured.out.splitlines()] == [
        ["ok", "first"], ["FAIL", "broken"], ["warn", "cores"], ["FAIL", "disk"], ["ok", "kernels"]
    ]  # fmt: skip
    assert "cannot be looked at: RuntimeError: libcudart.so: cannot open; run `pip install -e .`" in captured.out
    assert captured.err == "error: training cannot start here until this is right: broken, disk\n"
    monkeypatch.setattr(doctor, "CHECKS", (slow,))
    assert main(["doctor"]) == 0, "a warning is no error"


def test_a_machine_without_torch_still_gets_its_report() -> None:
    code = """
import sys
sys.modules["torch"] = None
from pretrain.report import doctor
doctor.CHECKS = (doctor.python, doctor.kernels, doctor.devices, doctor.cores, doctor.disk)
from pretrain.__main__ import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    levels = [line.split()[:2] for line in done.stdout.splitlines()]
    assert levels == [["ok", "python"], ["FAIL", "kernels"], ["FAIL", "devices"], ["FAIL", "cores"], ["ok", "disk"]]
    assert done.returncode == 3 and "Traceback" not in done.stderr


def test_another_python(monkeypatch: Patch) -> None:
    assert_line(only(check_software.python), "ok", sys.executable)
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.18")
    assert_line(only(check_software.python), "FAIL", "3.9.18", "must be >=3.11")


def test_packages_that_are_missing_or_of_another_version(monkeypatch: Patch) -> None:
    real = metadata.version

    def other(name: str) -> str:
        if name == "pydantic":
            raise metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "deepspeed" else real(name)

    monkeypatch.setattr(metadata, "version", other)
    found = {line.name: line for line in check_software.packages()}
    assert set(found) == {"pydantic", "deepspeed"}
    assert_line(found["pydantic"], "FAIL", "is missing: run `pip install -e .`")
    assert_line(found["deepspeed"], "FAIL", "must be ", "is 0.0.1")
    monkeypatch.setattr(check_software, "PROJECT", "a-project-that-nobody-installed")
    assert_line(only(check_software.packages), "FAIL", "is not installed in this Python: run `pip install -e .`")


@pytest.fixture
def gpu(monkeypatch: Patch) -> SimpleNamespace:
    """A made-up GPU; change its fields."""
    card = SimpleNamespace(name="NVIDIA H200", total_memory=141 * GB, major=9, minor=0)
    monkeypatch.setattr(check_software, "_driver", lambda: "550.54")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return card


def test_devices_that_torch_has_code_for_or_not(gpu: SimpleNamespace, monkeypatch: Patch) -> None:
    first, card = check_software.devices()
    assert_line(first, "ok", "built for CUDA 12.8, driver 550.54")
    assert_line(card, "ok", "cuda:0 NVIDIA H200, 141 GB, sm_90")
    gpu.major = 12
    assert_line(list(check_software.devices())[1], "FAIL", "sm_120, torch has code for sm_80 sm_90 only")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert_line(list(check_software.devices())[2], "warn", "DS_ACCELERATOR=cpu: training will leave the GPUs alone")


def test_a_gpu_that_torch_does_not_see(gpu: SimpleNamespace, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_line(list(check_software.devices())[1], "warn", "torch sees no GPU", "CUDA_VISIBLE_DEVICES='' hides it")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert_line(list(check_software.devices())[1], "warn", "torch is a CPU build: install a CUDA build")
    monkeypatch.setattr(check_software, "_driver", lambda: None)
    assert_line(list(check_software.devices())[1], "ok", "cpu: no GPU here")


@pytest.mark.parametrize(
    ("known", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (8, 6), True), (["sm_86"], (8, 0), False), (["sm_90"], (10, 0), False),
        (["sm_80", "compute_80"], (12, 0), True), (["compute_90"], (8, 9), False), (["sm_90a"], (9, 0), True),
        (["sm_100a", "compute_100a"], (10, 3), False), (["sm_100", "gfx90a"], (10, 0), True), ([], (9, 0), False),
    ],
)  # fmt: skip
def test_which_code_runs_on_which_gpu(known: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert check_software.runs_on(known, *capability) is runs


def test_a_deepspeed_that_cannot_be_imported_or_hangs(monkeypatch: Patch) -> None:
    monkeypatch.setattr(check_software, "IMPORT_DEEPSPEED", "raise ImportError('no compiler')")
    line = only(check_software.deepspeed)
    assert_line(line, "FAIL", "cannot be imported: ImportError: no compiler", "`engine.kind: local`")
    monkeypatch.setattr(check_software, "IMPORT_DEEPSPEED", "import time; time.sleep(60)")
    monkeypatch.setattr(check_software, "PATIENCE", 0.2)
    assert_line(only(check_software.deepspeed), "FAIL", "no answer in 0.2 s")


def test_ranks_that_do_not_meet(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refuse = "import os, sys; sys.exit('no route to host' if sys.argv[1] == 'cpu' and os.environ['RANK'] == '1' else 0)"
    monkeypatch.setattr(check_software, "SAY_HELLO", refuse)
    gloo, nccl = check_software.ranks()
    assert gloo.name == "gloo" and nccl.name == "nccl" and nccl.level == "ok"
    assert_line(gloo, "FAIL", "two ranks do not meet: no route to host", "GLOO_SOCKET_IFNAME=lo")


def test_no_tensorboard(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (line,) = doctor._lines(check_software.tensorboard)
    assert_line(line, "FAIL", "cannot be looked at", "torch.utils.tensorboard")


def test_the_apex_of_pypi(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert_line(only(check_software.apex), "warn", "not NVIDIA's", "pip uninstall apex")
    (tmp_path / "apex" / "optimizers").mkdir()
    assert_line(only(check_software.apex), "ok", "NVIDIA's, ")


def test_few_cores(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(check_machine, "_number", lambda path, pattern: 1.5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    line = only(check_machine.cores)
    assert_line(line, "warn", "1.5 of 64 cores usable", "OMP_NUM_THREADS is not set", "ask the scheduler")
    monkeypatch.undo()
    limit = tmp_path / "cpu.max"
    for text, number in (("150000 100000\n", 1.5), ("max 100000\n", None), ("", None)):
        limit.write_text(text)
        assert check_machine._number(str(limit), r"(\d+) (\d+)") == number
    limit.write_text("4096\n")
    assert check_machine._number(str(limit), r"(\d+)") == 4096
    assert check_machine._number(str(tmp_path / "none"), r"(\d+)") is None


def test_little_memory(monkeypatch: Patch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=32 * GB, total=64 * GB))
    monkeypatch.setattr(check_machine, "_number", lambda path, pattern: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 * 10**6))
    memory, shared = check_machine.memory()
    assert_line(memory, "ok", "32 GB free of 64 GB")
    assert_line(shared, "warn", "64 MB free", "--shm-size", "data.workers=0")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8 * GB))
    monkeypatch.setattr(check_machine, "_number", lambda path, pattern: 2.0 * GB)
    assert_line(only(check_machine.memory), "warn", "of 2 GB", "`plan` tells what a configuration needs")


def test_a_folder_for_runs(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50 * GB))
    assert_line(only(check_machine.disk), "ok", f"50 GB free in {tmp_path}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=GB))
    assert_line(only(check_machine.disk), "warn", "1 GB free", "12 bytes a parameter")

    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(check_machine.fcntl, "lockf", refuse)
    assert_line(list(check_machine.disk())[1], "warn", "file system without locks")
    assert list(tmp_path.iterdir()) == []

    def read_only(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert_line(only(check_machine.disk), "FAIL", f"{tmp_path} cannot be written: Read-only file system", "`runs`")


def test_a_port_that_is_taken(monkeypatch: Patch) -> None:
    with socket.create_server(("", 0)) as server:
        number = server.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(number))
        busy = only(check_machine.port)
        assert_line(busy, "warn", f"{number} cannot be used", "in use", "--master_port ")
        with socket.create_connection(("127.0.0.1", number)) as client:
            server.accept()[0].close()  # who closes first leaves a connection that waits
            client.recv(1)
    assert_line(only(check_machine.port), "ok", f"{number} is free")
    for nonsense in ("many", "70000"):
        monkeypatch.setenv("MASTER_PORT", nonsense)
        assert_line(only(check_machine.port), "warn", f"{nonsense} cannot be used")


@pytest.mark.parametrize(
    ("variables", "name", "message"),
    [
        ({"RANK": "0"}, "launcher", "only RANK of RANK and WORLD_SIZE is set"),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "a"}, "launcher", "only WORLD_SIZE of RANK and WORLD_SIZE is set"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "launcher", "RANK and WORLD_SIZE=4 are set here: without a launcher"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, "slurm", "a Slurm job of 8 tasks without RANK"),
    ],
)
def test_variables_that_mislead_a_start(variables: dict[str, str], name: str, message: str) -> None:
    shown, line = check_machine.launcher(variables | {"HF_TOKEN": "hf_secret"})
    assert line.name == name
    assert_line(line, "warn", message)
    assert all(f"{key}={value}" in shown.text for key, value in variables.items() if key != "MASTER_ADDR")
    assert "secret" not in shown.text


def test_variables_that_are_right() -> None:
    (nothing,) = check_machine.launcher({})
    assert_line(nothing, "ok", "nothing of a launcher or scheduler is set")
    for right in (
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"},
    ):
        (line,) = check_machine.launcher(right)
        assert line.level == "ok"


class Refuses(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(403)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_hub_that_answers_is_away_or_is_not_wanted(monkeypatch: Patch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", address := f"http://127.0.0.1:{server.server_port}")
        assert_line(only(check_machine.hub), "ok", f"{address} answers")
        server.shutdown()
    away = only(check_machine.hub)
    assert_line(away, "warn", f"{address} is not reachable ([Errno", "Connection refused", "use local files")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(check_machine, "HUB_PATIENCE", 0.2)
        assert only(check_machine.hub).level == "warn"
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    assert only(check_machine.hub).level == "warn"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_line(only(check_machine.hub), "ok", "HF_HUB_OFFLINE is set")

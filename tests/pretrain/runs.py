"""What the tests of whole runs share: a tiny data folder, a configuration, and the command line in another process."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.__main__ import main
from pretrain.checkpoints.seal import MANIFEST, describe, manifest_bytes, number, plain_files
from pretrain.runs import read_events

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "the",
    "a",
    "small",
    "red",
    "cat",
    "dog",
    "house",
    "river",
    "runs",
    "sleeps",
    "near",
    "under",
    "and",
    "quickly",
)

# Of a run; engine and train are still to come.
SMALL = """
name: {name}
runs: {runs}
data: {{path: {data}, workers: 0}}
model: {{d_model: 16, encoder_layers: 1, decoder_layers: 2, heads: 2, ffn_dim: 32, max_positions: 128}}
objective: {{name: janus}}
batch: {{samples: 6, micro_max_tokens: 96}}
optim: {{lr: 1e-2, warmup: 2}}
"""
CONFIG = (
    SMALL
    + """\
engine: {{kind: local}}
train: {{steps: 6, log_every: 1, validate_every: 3, validate_batches: 2, sample_every: 3, save_every: 3}}
"""
)


def write_text(path: Path, documents: int) -> Path:
    draw = random.Random(7)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(6, 20))).capitalize() + "." for _ in range(documents)]
    path.write_text("\n\n".join(lines) + "\n")
    return path


def make_data(folder: Path, documents: int, text: str = "a.txt") -> Path:
    """The data folder `folder`/data of one source, `tiny`."""
    source = f"tiny=text:{write_text(folder / text, documents)}"
    given = ["--out", str(folder / "data"), "--source", source, "--train-tokenizer", "300", "--workers", "1"]
    assert main(["prepare", *given]) == 0
    return folder / "data"


def write_config(folder: Path, data: Path, name: str = "tiny") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.format(name="tiny", runs=folder / "runs", data=data))
    return path


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def start(*arguments: Any, launcher: tuple[str, ...] = (sys.executable, "-m")) -> "subprocess.Popen[str]":
    command = [*launcher, "pretrain", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True)


def command(*arguments: Any, launcher: tuple[str, ...] = (sys.executable, "-m")) -> tuple[int, str]:
    process = start(*arguments, launcher=launcher)
    out, err = process.communicate(timeout=240)
    return process.returncode, out + err


def wait_for_save(process: "subprocess.Popen[str]", run: Path, seconds: float = 150.0) -> None:
    """Returns after the first checkpoint of this life; fails if the process ends before it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "events.jsonl").exists() and any(e["event"] == "save" for e in read_events(run)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint within {seconds} s")


def reseal(commit: Path) -> None:
    """Writes the manifest of a commit anew, as someone who changed its files on purpose would."""
    described = {}
    for path in plain_files(commit):
        with path.open("rb") as file:
            described[path.name] = describe(file)
    step = number(commit.name)
    assert step is not None
    (commit / MANIFEST).write_bytes(manifest_bytes(step, described))


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} as TensorBoard shows them."""
    board = EventAccumulator(str(run / "tb"))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def training_curve(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that depend neither on the clock, nor on the machine, nor on how often the run was ended."""
    return {tag: values for tag, values in scalars(run).items() if not tag.startswith(("speed/", "memory/", "events/"))}

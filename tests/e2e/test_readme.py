"""Every command of the README runs, in its order, cut down; figures are those of `make bench` and of RESULTS.md."""

import gzip
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.lives import free_port
from tests.pretrain.bundles.test_bart import make_theirs, save
from tests.pretrain.runs import write_text

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NARROW = ["model.d_model=32", "model.heads=2", "model.ffn_dim=32", "train.validate_every=0", "train.sample_every=0"]
# The shape of the BART that stands in for the real one.
TINY = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "heads": 2, "ffn_dim": 24, "max_positions": 512}
ON_A_CPU = ["engine.precision=fp32", "batch.samples=4", "data.workers=0", *NARROW[3:]]
ON_A_CPU += [f"model.{key}={value}" for key, value in TINY.items()]
FEW_UPDATES = ["train.steps=2", "train.validate_every=0", "train.sample_every=0", "batch.samples=4"]
SELECTING = [*FEW_UPDATES[:2], "train.sample_every=1", "train.save_every=1", "scored=null", "shown=2"]
SMALLER = {
    "configs/pretrain/janus_base.yaml": ON_A_CPU,
    "configs/pretrain/quickstart.yaml": ["train.steps=2", "train.save_every=2", "batch.tokens=256", *NARROW],
    "configs/pretrain/wiki_books_small.yaml": ["train.steps=2", "batch.tokens=256", "data.workers=0", *NARROW],
    "configs/pretrain/debug.yaml": ["train.steps=2"],
    "configs/finetune/stdlib_summaries/ar.yaml": ["train.steps=2", "train.validate_every=0", "train.sample_every=0"],
    "configs/finetune/stdlib_summaries/nar.yaml": ["train.steps=2", "train.validate_every=0", "train.sample_every=0"],
    "configs/finetune/stdlib_summaries/hard_exit.yaml": FEW_UPDATES,
    "configs/finetune/stdlib_summaries/soft_exit.yaml": FEW_UPDATES,
    "configs/finetune/stdlib_summaries/janus.yaml": SELECTING,
}


def commands() -> list[str]:
    blocks = README.split("```sh\n")[1:]
    return [line for block in blocks for line in block.split("```")[0].splitlines() if line]


def run(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words if "=" in word and word.split("=")[0].isupper())
    words = words[len(settings) :]
    words, to = (words[: words.index(">")], words[-1]) if ">" in words else (words, "")
    for config, overrides in SMALLER.items():
        words += overrides if config in words and "slurm" not in words else []
    if words[0] == "tensorboard":
        words.append("--inspect")
    beside = str(Path(sys.executable).parent)
    here = {"PATH": f"{beside}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if words[0] in ("deepspeed", "torchrun"):  # another test may use the usual port at this moment
        words[1:1] = ["--master_port", str(free_port())]
    if words[0] == "deepspeed" and "--num_gpus" not in words:  # without a GPU it must be told how many ranks
        words[1:1] = ["--num_gpus", "1"]
    env = os.environ | here | settings
    ended = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    if to:
        (folder / to).write_text(ended.stdout)
    return ended


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout, so that what the commands write stays out of it."""
    for name in ("pretrain", "finetune", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    save(
        make_theirs(max_position_embeddings=TINY["max_positions"]), tmp_path / "bart-base"
    )  # random and tiny, in the layout of the real one
    (tmp_path / "corpus").mkdir()
    text = write_text(tmp_path / "corpus" / "a.txt", 60)
    (tmp_path / "corpus" / "a.txt.gz").write_bytes(gzip.compress(text.read_bytes()))
    (tmp_path / "wiki").symlink_to("corpus")
    (tmp_path / "books" / "someone").mkdir(parents=True)
    write_text(tmp_path / "books" / "someone" / "a.md", 60)
    write_text(tmp_path / "books" / "someone" / "b.md", 40)
    return tmp_path


@pytest.mark.timeout(1500)
def test_every_command_runs(checkout: Path) -> None:
    told = commands()
    assert len(told) >= 12
    for command in told:
        if command.startswith("make "):
            done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True)
        else:
            done = run(command, checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        for split in checkout.glob("runs/*/task/test.*"):  # a few sentences show that generation works
            split.write_text("".join(split.read_text(encoding="utf-8").splitlines(keepends=True)[:4]), encoding="utf-8")
    assert len((checkout / "nar.txt").read_text(encoding="utf-8").splitlines()) == 4


def test_figures_are_those_of_the_benchmark() -> None:
    rows = json.loads((ROOT / "kernels" / "bench" / "results" / "cpu.json").read_text(encoding="utf-8"))
    assert rows
    table = README.split("<!-- bench -->")[1].split("<!-- /bench -->")[0]
    for row in rows:
        line = next((line for line in table.splitlines() if f"`{row['name']}`" in line), None)
        assert line, f"README has no row for {row['name']}"
        assert f"{row['ratio']:,.2f}" in line, f"README says {line}, the benchmark {row['ratio']:,.2f}"
        assert row["ok"] != ("missed" in line), f"README must say of {row['name']} whether it misses its target"


def test_claims_are_those_of_the_results() -> None:
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    shown = README.split("<!-- claims -->")[1].split("<!-- /claims -->")[0].strip().splitlines()
    rows = [line for line in shown if line.startswith("| ")]
    assert len(rows) > 3
    for row in rows:
        assert row in results, f"README says {row}, RESULTS.md does not"


def test_times_are_those_of_the_writing_benchmark() -> None:
    rows = json.loads((ROOT / "kernels/bench/results/writing_cpu.json").read_text(encoding="utf-8"))["rows"]
    measured = {(row["model"], row["by"], row["way"], row["batch"]): row for row in rows}
    table = README.split("<!-- writing -->")[1].split("<!-- /writing -->")[0].strip().splitlines()[2:]
    assert len(table) > 10
    for line in table:
        model, by, way, *numbers = [cell.strip() for cell in line.strip("|").split("|")]
        one, eight = (measured[model, by, way, batch] for batch in (1, 8))
        told = [f"{one['ms_a_sentence']:.1f}", f"{one['speedup']:.2f}", f"{100 * one['encoder_share']:.0f} %"]
        assert numbers == [*told, f"{eight['ms_a_sentence']:.1f}", f"{eight['speedup']:.2f}"], line

"""LPLM pre-trained for a few steps -> tuned with hard exits -> texts -> the table and picture of thresholds."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from finetune.__main__ import main
from finetune.charts import HEIGHT, PIXELS, WIDTH
from pretrain.__main__ import main as pretrain
from pretrain.bundles.bundle import load_bundle
from tests.finetune.test_end_to_end import bundle_at
from tests.pretrain.runs import WORDS, make_data, write_config

PAIRS = [(f"{a} {b} {c}", f"{c} {a}") for a in WORDS[:4] for b in WORDS[4:8] for c in WORDS[8:12]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hard")
    config = write_config(folder, make_data(folder, 40))
    text = config.read_text().replace("objective: {name: janus}", "objective: {name: lplm, preset: released}")
    config.write_text(text.replace("decoder_layers: 2", "decoder_layers: 3"))
    assert pretrain(["train", str(config), "train.steps=3"]) == 0
    assert pretrain(["handoff", str(folder / "runs" / "tiny"), "--out", str(folder / "lplm")]) == 0
    lines = [f"{source}\t{target}\n" for source, target in PAIRS]
    (folder / "train.tsv").write_text("".join(lines[10:]), encoding="utf-8")
    (folder / "test.tsv").write_text("".join(lines[:10]), encoding="utf-8")
    (folder / "test.src").write_text("".join(f"{source}\n" for source, _ in PAIRS[:10]), encoding="utf-8")
    (folder / "test.tgt").write_text("".join(f"{target}\n" for _, target in PAIRS[:10]), encoding="utf-8")
    bundle_at(folder / "told", ("hard_exit",), "bos_first", trained=False)
    bundle_at(folder / "janus", ("ar", "nar"), "bos_first")
    assert main(["train", str(config_at(folder, "all"))]) == 0
    return folder


def config_at(place: Path, name: str, **runner: Any) -> Path:
    values = {
        "name": name, "runs": str(place / "runs"), "bundle": str(place / "lplm"),
        "task": {"name": "pairs", "train": str(place / "train.tsv"), "valid": str(place / "test.tsv")},
        "runner": {"name": "hard_exit", "rows": 11, **runner},
        "max_source": 32, "max_target": 12, "shown": 3, "batch": {"samples": 8},
        "train": {"steps": 3, "save_every": 2, "validate_every": 2, "sample_every": 3, "log_every": 1},
    }  # fmt: skip
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_what_was_pre_trained_travels(place: Path) -> None:
    start, tuned = load_bundle(place / "lplm").description, load_bundle(place / "runs" / "all" / "bundle").description
    assert start.modes == tuned.modes == ("hard_exit",) and not tuned.length_trained
    assert tuned.objective["first_row"] == "bos" and tuned.objective["rows"] == 11
    assert (place / "runs" / "all" / "samples" / "step_000003.txt").read_text(encoding="utf-8").count("target") == 3


def test_simulated_exits_and_predicted_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoding = {"rows": "predicted", "threshold": 3.0}
    runner: dict[str, Any] = {"training": "simulated", "threshold": 5.6, "rows": "target", "length_weight": 0.1}
    assert main(["train", str(config_at(place, "simulated", **runner, decoding=decoding))]) == 0
    capsys.readouterr()
    bundle = str(place / "runs" / "simulated" / "bundle")
    command = ["generate", bundle, "--mode", "hard_exit", "--input", str(place / "test.src"), "--output", "-"]
    assert main([*command, "--rows", "predicted"]) == 0
    made = capsys.readouterr()
    assert made.out.count("\n") == 10 and "1 decoder passes a batch" in made.err


def test_generate_tells_where_tokens_left(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(place / "runs" / "all" / "bundle")
    command = ["generate", bundle, "--mode", "hard_exit", "--input", str(place / "test.src"), "--output", "-"]
    made = {}
    for name, options in {
        "deep": ["--threshold", "0"],
        "early": ["--threshold", "20"],
        "single": ["--threshold", "20", "--batch-tokens", "1"],
        "second": ["--threshold", "20", "--test-layers", "2"],
    }.items():
        capsys.readouterr()
        assert main([*command, *options]) == 0
        made[name] = capsys.readouterr()
        assert made[name].out.count("\n") == 10
    assert "mean exit layer 3.00 (1: 0 % 2: 0 % 3: 100 %)" in made["deep"].err
    assert "mean exit layer 1.00 (1: 100 % 2: 0 % 3: 0 %)" in made["early"].err
    assert "mean exit layer 2.00" in made["second"].err
    assert made["early"].out == made["single"].out
    capsys.readouterr()
    other = ["generate", str(place / "janus"), "--mode", "nar", "--input", str(place / "test.src"), "--output", "-"]
    assert main([*other, "--max-length", "12"]) == 0
    assert "exit" not in capsys.readouterr().err


def test_generation_does_not_see_references(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "test.src").write_text((place / "test.src").read_text())
    made = []
    for source in (place / "test.src", tmp_path / "test.src"):
        capsys.readouterr()
        bundle = str(place / "runs" / "all" / "bundle")
        assert main(["generate", bundle, "--mode", "hard_exit", "--input", str(source), "--output", "-"]) == 0
        made.append(capsys.readouterr().out)
    assert made[0] == made[1]


def test_sweep(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, picture = str(place / "runs" / "all" / "bundle"), place / "pictures" / "figure.png"
    command = ["sweep-threshold", bundle, "--output", str(picture), "--data"]
    assert main([*command, str(place / "test.tsv"), "--thresholds", "0", "3", "20"]) == 0
    one = capsys.readouterr().out
    rows = [line.replace("%", "").split() for line in one.splitlines()[1:4]]
    assert [float(row[0]) for row in rows] == [0, 3, 20]
    assert re.match(r"threshold +rouge1 +rouge2 +rougeL +layer 1 +layer 2 +layer 3 +mean +GFLOP +ramps +ms", one)
    assert rows[0][4:8] == ["0.0", "0.0", "100.0", "3.00"] and rows[2][4:8] == ["100.0", "0.0", "0.0", "1.00"]
    assert float(rows[2][8]) < float(rows[0][8])  # fewer operations
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.size == (2 * WIDTH * PIXELS, 2 * HEIGHT * PIXELS)
    # references change the scores and nothing else
    (place / "other.tgt").write_text("nothing\n" * 10)
    assert main([*command, str(place / "test.src"), str(place / "other.tgt"), "--thresholds", "0", "3", "20"]) == 0
    two = [line.replace("%", "").split() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [row[4:-1] for row in two] == [row[4:-1] for row in rows]


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["generate", "JANUS", "--mode", "hard_exit", "--input", "IN", "--output", "-"], 2, "with mode hard_exit"),
        (["generate", "TUNED", "--mode", "nar", "--input", "IN", "--output", "-"], 2, "needs a bundle with mode nar"),
        (["generate", "TUNED", "--threshold", "-1"], 3, "must be greater than or equal to 0, got -1"),
        (["generate", "TUNED", "--threshold", "nan"], 3, "`decoding.threshold` must be a finite number"),
        (["generate", "TUNED", "--threshold", "inf"], 3, "`decoding.threshold` must be a finite number"),
        (["generate", "TUNED", "--max-length", "129"], 3, "at most the model's 128 positions, got 129"),
        (["generate", "TUNED", "--rows", "predicted"], 3, "`decoding.rows` must be `fixed`"),
        (["generate", "TUNED", "--test-layers", "3"], 3, "`test_layers` must be layers from 1 to 2, got 3"),
        (["generate", "TUNED", "--beam", "3"], 2, "`--beam` must not be given with `--mode` hard_exit"),
        (["generate", "UNTUNED"], 2, "took the length of each text from it (`rows` target): tune the bundle first"),
        (["sweep-threshold", "UNTUNED", "--data", "TSV"], 2, "tune the bundle first"),
        (["sweep-threshold", "JANUS", "--data", "TSV"], 2, "a bundle with mode hard_exit"),
        (["sweep-threshold", "TUNED", "--data", "IN"], 4, "must be source, a tab and target"),
        (["sweep-threshold", "TUNED", "--data", "IN", "IN", "IN"], 3, "`--data` must be one TSV or JSONL file or two"),
        (["sweep-threshold", "TUNED", "--data", "TSV", "--thresholds", "nan"], 3, "must be a finite number"),
        (["sweep-threshold", "TUNED", "--data", "TSV", "--sentences", "0"], 2, "must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(
    place: Path, command: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"JANUS": "janus", "TUNED": "runs/all/bundle", "UNTUNED": "told", "IN": "test.src", "TSV": "test.tsv"}
    if command[0] == "generate" and "--mode" not in command:
        command = [*command, "--mode", "hard_exit", "--input", "IN", "--output", "-"]
    assert main([str(place / names[word]) if word in names else word for word in command]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error

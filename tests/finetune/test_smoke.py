"""`preset=smoke` of a shipped YAML tunes a small random bundle on a few pairs, and writes."""

from pathlib import Path

import pytest

from finetune.__main__ import main
from tests.finetune.test_end_to_end import bundle_at

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "max_source=16",
    "max_target=32",
    "runner.decoding={iterations: 1, max_length: 32}",
    "batch.micro_max_tokens=256",
]


def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bundle_at(tmp_path / "bundle", ("ar", "nar"), "bos_first")
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "dev", "test"):
        long = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu " * 3
        (data / f"{split}.src").write_text(f"{long}\n\n" + "alpha [SEP] beta\n" * 30)
        (data / f"{split}.tgt").write_text("beta\n" * 32)
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "finetune" / "squad_qg" / "nar.yaml")
    assert main(["train", config, "preset=smoke", "bundle=bundle", "task.path=data", *SHORT]) == 0
    told = capsys.readouterr().err
    assert "16 training, 16 validation and 16 test pairs; 1 sources cut to 16 tokens" in told
    assert "1 empty pairs left out" in told
    run = tmp_path / "runs" / "smoke" / "squad-qg-nar"
    assert (run / "bundle" / "model.safetensors").is_file()
    assert (run / "samples" / "step_000002.txt").read_text(encoding="utf-8").count("\nnar ") == 2
    # The test set keeps its empty line, so that hypotheses stay beside their references.
    assert (run / "task" / "test.source").read_text(encoding="utf-8").split("\n")[1] == ""

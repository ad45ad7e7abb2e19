"""RESULTS.md: what is known, verdicts in both directions, remarks that stay; and a study of two updates, end to end."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.reproduce.claim import Claim, Comparison, Row, Score
from finetune.reproduce.command import reproduce
from finetune.reproduce.results import BEGIN, END, fill, results
from finetune.reproduce.step import Queue, Step
from finetune.reproduce.study import Written
from pretrain.errors import CheckpointError, DataError, UsageError


def written(folder: Path, name: str, value: float | None) -> Written:
    output = folder / f"{name}.json"
    scored = Step(name, ("python", "-c", "pass"), output=output)
    if value is not None:
        output.write_text(json.dumps({"scores": {"bleu": value}}))
    return Written(folder / f"{name}.txt", folder / "references", scored, scored)


def claim(folder: Path, ours: float | None, theirs: float | None, p_value: float | None = None) -> Claim:
    mine, other = (Score(written(folder, name, value), "bleu") for name, value in (("a", ours), ("b", theirs)))
    test = None
    if p_value is not None:
        test = Step("test", ("python",), output=folder / "test.json")
        (folder / "test.json").write_text(json.dumps({"against": {"bleu": {"p_value": p_value}}}))
    rows = [Row("A", [100, mine], ["37.24"]), Row("B", [100, other], ["34.74"])]
    comparison = Comparison("A > B", mine, other, "37.24 > 34.74", test, "bleu")
    return Claim("A is better than B", "Paper, Table 1", "How.", ["", "updates", "BLEU", "paper"], rows, [comparison])


def page(folder: Path, *claims: Claim) -> str:
    return results(claims, Queue(folder, 1, 1, 0.0), "python -m finetune reproduce study.yaml")


def test_rows_and_verdict(tmp_path: Path) -> None:
    text = page(tmp_path, claim(tmp_path, 12.345, 10.0, 0.001))
    assert "## A is better than B\n\n*Paper, Table 1.* How.\n\n|  | updates | BLEU | paper |" in text
    assert "| A | 100 | 12.35 | 37.24 |\n| B | 100 | 10.00 | 34.74 |" in text
    assert "| A > B | 12.35, 10.00 | 37.24 > 34.74 | holds (p 0.001) |" in text


def test_what_is_not_measured_is_left_out(tmp_path: Path) -> None:
    text = page(tmp_path, claim(tmp_path, None, 10.0))
    assert "| A |" not in text and "| B | 100 | 10.00 |" in text and "A > B" not in text
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "Nothing is measured yet." in page(empty, claim(empty, None, None))


@pytest.mark.parametrize(
    ("values", "smaller", "said"),
    [((2.0, 1.0, None), False, "holds"), ((1.0, 2.0, None), False, "does not hold"), ((1.0, 1.0, None), False, "equal"),
     ((2.0, 1.0, 0.3), False, "no sure difference (p 0.300)"), ((1.0, 2.0, 0.01), False, "does not hold (p 0.010)"),
     ((1.0, 2.0, None), True, "holds"), ((2.0, 1.0, 0.04), True, "does not hold (p 0.040)")],
)  # fmt: skip
def test_verdicts(values: tuple[float, float, float | None], smaller: bool, said: str) -> None:
    assert Comparison.verdict(*values, smaller) == said


def test_claims_of_one_heading_are_one_section(tmp_path: Path) -> None:
    both = [claim(tmp_path, 12.0, 10.0), claim(tmp_path, 13.0, 10.0)]
    assert page(tmp_path, *both).count("## A is better than B") == 1


def test_remarks_stay() -> None:
    begun = fill("", "first")
    assert begun.startswith("# Results") and f"{BEGIN}\nfirst\n{END}" in begun
    remarked = begun.replace("# Results", "# Results\n\nLooked into.") + "\nAfter.\n"
    again = fill(remarked, "second")
    assert "Looked into." in again and again.endswith("After.\n") and "first" not in again and "second" in again


ROOT = Path(__file__).resolve().parents[3]
WORDS = ["ein", "eine", "mann", "frau", "hund", "katze", "rot", "blau", "geht", "steht"]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """A folder of data in which Multi30k has a few pairs and the rest is empty."""
    rng = random.Random(0)
    folder = tmp_path / "data" / "multi30k"
    for name in ("multi30k", "squad_qg", "wikipedia_en", "books"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for split, count in {"train": 60, "val": 6, "test_2016_flickr": 5}.items():
        for side in ("de", "en"):
            lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 7))) for _ in range(count)]
            with gzip.open(folder / f"{split}.{side}.gz", "wt") as file:
                file.write("".join(f"{line}\n" for line in lines))
    return tmp_path


def command(folder: Path, *rest: str) -> "subprocess.CompletedProcess[str]":
    for name in ("configs", "pretrain", "finetune", "kernels"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    small = ["rounds=[{translation: 2, pretraining: 2, continued: 2, tuning: 2}]"]
    small += ["translation.vocabulary=300", "data=data"]
    words = [sys.executable, "-m", "finetune", "reproduce", "configs/reproduce/cpu.yaml", *small, *rest]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_study_of_two_updates(captions: Path) -> None:
    only = ["--only", "score/multi30k-transformer", "score/multi30k-cmlm-1-2/NAR-0"]
    done = command(captions, *only)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (captions / "RESULTS.md").read_text()
    assert re.search(r"\| Transformer \| 2 \| 1 \| \d+\.\d\d \| - \|", text)
    assert "| CMLM | 2 | 1 | - | " in text and "| JANUS |" not in text
    assert "python -m finetune train configs/finetune/multi30k/ar.yaml" in text and str(captions) not in text
    again = command(captions, *only)
    assert again.returncode == 0 and "begin " not in again.stderr, again.stderr[-3000:]


def test_what_cannot_begin_is_told(captions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(captions)
    (captions / "configs").symlink_to(ROOT / "configs")
    study = "configs/reproduce/cpu.yaml"
    with pytest.raises(UsageError, match="`--hours` must be above 0, got 0"):
        reproduce(study, hours=0.0)
    with pytest.raises(UsageError, match=r"beginning of the name of a step \(begin, .*got 'sleep'"):
        reproduce(study, only=["sleep"])
    (captions / "data" / "books").rmdir()
    with pytest.raises(DataError, match="`data` has no books/"):
        reproduce(study)
    assert not (captions / "RESULTS.md").exists() and not (captions / "runs").exists()


def test_two_at_once_are_refused(captions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(captions)
    (captions / "configs").symlink_to(ROOT / "configs")
    hold = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
        "from pretrain.checkpoints.commit import Store\n"
        "store = Store('runs/reproduce')\nstore.lock()\nprint(flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        with pytest.raises(CheckpointError, match=rf"in use by host \S+ pid {other.pid}"):
            reproduce("configs/reproduce/cpu.yaml", ["data=data"])
        other.terminate()
    assert not (captions / "RESULTS.md").exists()

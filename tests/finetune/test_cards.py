"""Scores in the model card: those of training, those of `report --cards`, and everything people wrote around them."""

from pathlib import Path

import pytest
import yaml

from finetune.__main__ import main
from finetune.report import cards
from finetune.report.cards import END_INDEXED, INDEX, INDEXED, with_scores
from finetune.scores import score
from finetune.tasks.pairs import read_lines
from pretrain.__main__ import main as pretrain
from pretrain.bundles.bundle import read_provenance
from pretrain.bundles.card import END_TESTED, TESTED
from pretrain.checkpoints.checkpoint import read_progress
from pretrain.checkpoints.commit import Store
from pretrain.errors import CheckpointError
from tests.finetune.test_end_to_end import config_at, place

__all__ = ["place"]
TOLD, FOUND = "Told.\n", {INDEX: [{"name": "n"}]}


@pytest.fixture(scope="module")
def tuned(place: Path) -> Path:
    few = {"steps": 3, "save_every": 2, "validate_every": 3, "sample_every": 3}
    assert main(["train", str(config_at(place, "carded", "nar", train=few, scored=5))]) == 0
    return place / "runs" / "carded"


def test_the_end_of_training_has_its_scores(tuned: Path) -> None:
    kept = read_progress(Store(tuned).commits()[-1])["progress"]["scores"]
    assert {"valid/total", "written/nar/rougeL", "written/nar/length_ratio"} < kept.keys()
    assert kept["written/pairs"] == 5
    provenance = read_provenance(tuned / "bundle")
    assert provenance["checkpoints"] == [3] and provenance["scores"] == [kept]
    card = (tuned / "bundle" / "README.md").read_text(encoding="utf-8")
    assert f"| nar | rougeL | {kept['written/nar/rougeL']:.6g} |" in card
    assert "the first 5 validation pairs" in card


def test_report_writes_into_the_card_alone(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    bundle = tuned / "bundle"
    card = bundle / "README.md"
    mine = card.read_text(encoding="utf-8").replace("library_name:", "license: mit  # ours\nlibrary_name:")
    card.write_text(mine + "\nNever for children.\n", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in bundle.iterdir() if path != card}
    few = ["report", str(tuned), "--sentences", "4", "--iterations", "0", "2", "--out", str(tmp_path), "--cards"]
    assert main(few) == 0
    assert f"{card}: has the scores" in capsys.readouterr().out
    first = card.read_bytes()
    assert main(few) == 0 and card.read_bytes() == first  # and not twice
    assert {path.name: path.read_bytes() for path in bundle.iterdir() if path != card} == before
    assert pretrain(["verify", str(bundle)]) == 0

    text = first.decode()
    assert "license: mit  # ours\n" in text and text.endswith("Never for children.\n")
    command = "python -m finetune generate BUNDLE --mode nar --iterations 2 --max-length 16 --batch-tokens 1"
    assert f"{command} --input FILE --output FILE" in text and "| bleu | `sacrebleu\\|nrefs:1" in text
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in read_lines(tuned / "task" / "test.source")[:4]))
    words = command.replace("BUNDLE", str(bundle)).split()[3:]
    assert main([*words, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "written")]) == 0
    values = score(read_lines(tmp_path / "written"), read_lines(tuned / "task" / "test.target")[:4], ["bleu", "rougeL"])
    row = next(line for line in text.splitlines() if line.startswith("| nar, 2 iterations |"))
    assert f"| {values.values['bleu']:.2f} |" in row and f"| {values.values['rougeL']:.2f} |" in row

    data = hub.ModelCard(text).data
    assert data.license == "mit" and data.model_name == "carded" and "nar" in data.tags
    found = {one.metric_name: one for one in data.eval_results}
    assert len(found) == 2 * 6 and found["bleu, nar, 2 iterations"].metric_type == "bleu"
    assert found["rougeL, nar, 2 iterations"].metric_value == round(values.values["rougeL"], 4)
    one = found["bleu, nar, 0 iterations"]
    assert (one.dataset_type, one.dataset_name, one.dataset_split) == ("pairs", "pairs, the first 4 pairs", "test")
    assert one.metric_args["iterations"] == 0 and one.metric_args["signature"] == values.signatures["bleu"]


def test_a_bundle_that_changed_meanwhile_keeps_its_card(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tuned / "bundle" / "README.md").read_bytes()
    monkeypatch.setattr(cards, "content_sha256", lambda bundle: "another")
    few = ["report", str(tuned), "--sentences", "1", "--iterations", "0", "--out", str(tmp_path), "--cards"]
    assert main(few) == 5 and "it has changed" in capsys.readouterr().err
    assert (tuned / "bundle" / "README.md").read_bytes() == before


MARKED = f"a: 1\n{INDEXED}\n{END_INDEXED}\n"
MINE = ("", "# Mine", "# Mine\n\n---\n\nMore.\n", f"# M\n\n{TESTED}\nBefore.\n{END_TESTED}\n\nMore.\n")


@pytest.mark.parametrize("front", ["", "---\n---\n", "---\nlicense: mit\n---\n", f"---\n{MARKED}---\n"])
@pytest.mark.parametrize("text", MINE)
def test_scores_have_their_place_in_any_card(front: str, text: str) -> None:
    once = with_scores(front + text, TOLD, FOUND, "card")
    assert once.count(TOLD) == once.count(TESTED) == once.count(INDEXED) == 1 and "Before." not in once
    assert with_scores(once, TOLD, FOUND, "card") == once
    values = yaml.safe_load(once.split("---\n")[1])
    assert values.pop(INDEX) == FOUND[INDEX]
    assert values == ({"license": "mit"} if "license" in front else {"a": 1} if "a: 1" in front else {})
    assert all(part in once for part in text.replace("Before.\n", "").split(TESTED + "\n"))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\na: 1\n", "must have a line --- behind its front matter"),
        ("---\na: [\n---\n", "must begin with YAML"),
        ("---\n- a\n---\n", "it has a list"),
        (f"---\n{INDEX}: []\n---\n", f"it has one with {INDEX}"),
        (f"{TESTED}\nmine\n", "must have both or none of the lines"),
        (f"mine\n{END_TESTED}\n", "must have both or none of the lines"),
        (f"---\n{END_INDEXED}\n{INDEXED}\n---\n", "must have both or none of the lines"),
        (b"\xff", "must be a UTF-8 text file"),
    ],
)
def test_a_card_that_cannot_take_scores_is_left_alone(
    tuned: Path, tmp_path: Path, card: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before anything is written."""
    path = tuned / "bundle" / "README.md"
    content = card if isinstance(card, bytes) else card.encode()
    path.write_bytes(content)
    assert main(["report", str(tuned), "--sentences", "1", "--out", str(tmp_path / "out"), "--cards"]) == 5
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert path.read_bytes() == content and not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError) if isinstance(card, str) else pytest.raises(UnicodeDecodeError):
        with_scores(content.decode(), "", {}, "card")

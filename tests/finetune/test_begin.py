"""From line-aligned text alone: random weights, the whole JANUS loss, both ways of writing, and what is watched."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.__main__ import main
from pretrain.bundles.bundle import Bundle, load_bundle
from pretrain.data.tokenizer import train_bpe
from tests.finetune.test_end_to_end import PAIRS, config_at

SHAPE = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "heads": 2, "ffn_dim": 32, "max_positions": 64,
    "length_classes": 32,
}  # fmt: skip
TRAIN = {"steps": 4, "save_every": 2, "sample_every": 2, "validate_every": 2, "log_every": 1, "keep": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begin")
    lines = [f"{source}\t{target}\n" for source, target in PAIRS]
    (folder / "train.tsv").write_text("".join(lines[20:]), encoding="utf-8")
    (folder / "valid.tsv").write_text("".join(lines[:10]), encoding="utf-8")
    (folder / "test.src").write_text("".join(f"{source}\n" for source, _ in PAIRS[10:20]), encoding="utf-8")
    (folder / "test.tgt").write_text("".join(f"{target}\n" for _, target in PAIRS[10:20]), encoding="utf-8")
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": SHAPE}), encoding="utf-8")
    return folder


def begun(place: Path, name: str, *words: str, **changes: Any) -> tuple[int, Path]:
    """(exit code, configuration) of `begin` for a run that will use its bundle."""
    values = {"runner": {"name": "janus"}, "train": TRAIN, **changes}
    config = config_at(place, name, "janus", f"{name}-bundle", **values)
    vocabulary = [] if "--tokenizer" in words else ["--train-tokenizer", "300"]
    return main(["begin", str(config), "--model", str(place / "model.yaml"), *vocabulary, *words]), config


def weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    return bundle.model.state_dict()


def test_the_same_arguments_give_the_same_bundle(place: Path) -> None:
    assert begun(place, "one")[0] == begun(place, "one", "--out", str(place / "again"))[0] == 0
    one, again = load_bundle(place / "one-bundle"), load_bundle(place / "again")
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(one).items())
    assert one.tokenizer.sha256 == again.tokenizer.sha256 and one.tokenizer.vocab_size <= 300
    assert one.description == again.description and one.description.modes == ("causal",)
    assert one.description.layout.query_position_offset == 1 and not one.description.length_trained
    both_sides = [text for pair in PAIRS[20:] for text in pair]
    assert one.tokenizer.sha256 == train_bpe(both_sides, 300).sha256 != train_bpe(both_sides[::2], 300).sha256
    assert begun(place, "one", "seed=2", "--out", str(place / "other"))[0] == 0
    other = load_bundle(place / "other")
    assert not torch.equal(other.model.shared.weight, one.model.shared.weight)
    assert other.tokenizer.sha256 == one.tokenizer.sha256


def test_options_of_the_bundle(place: Path) -> None:
    assert begun(place, "source")[0] == 0
    words = ("--tokenizer", str(place / "source-bundle"), "--query-position-offset", "0", "model.dropout=0.3")
    assert begun(place, "given", *words)[0] == 0
    bundle = load_bundle(place / "given-bundle")
    assert bundle.tokenizer.sha256 == load_bundle(place / "source-bundle").tokenizer.sha256
    assert bundle.description.layout.query_position_offset == 0 and bundle.description.model.dropout == 0.3


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("model.vocab_size=100",), 3, "`model.vocab_size` must be at least the tokenizer's"),
        (("model.width=3",), 3, "unknown key `model.width`"),
        (("--train-tokenizer", "20"), 3, "vocabulary size must be from 261 to"),
        (("--tokenizer", "nowhere"), 4, "tokenizer `nowhere` must be a tokenizer.json"),
        (("--out", "TASK"), 5, "exists and is no bundle"),
    ],
)
def test_refusals_leave_nothing(
    place: Path, words: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "taken").mkdir(exist_ok=True)
    given = [str(place / "taken") if word == "TASK" else word for word in words]
    assert begun(place, "refused", *given)[0] == code
    assert message in capsys.readouterr().err
    assert not (place / "refused-bundle").exists() and not list((place / "taken").iterdir())


def test_another_model_does_not_take_the_place_of_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert begun(place, "stays")[0] == 0
    assert begun(place, "stays", "model.ffn_dim=64")[0] == 5
    assert "with another `model.ffn_dim`" in capsys.readouterr().err
    assert begun(place, "stays")[0] == 0


def test_janus_from_scratch(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, chosen by the texts of one way, written from in both; TensorBoard shows each way."""
    decoding = {"ar": {"beam": 2, "max_length": 16}, "nar": {"iterations": 1, "max_length": 16}}
    train = {**TRAIN, "select": {"metric": "rougeL", "mode": "nar"}}
    code, config = begun(place, "scratch", scored=5, runner={"name": "janus", "decoding": decoding}, train=train)
    assert code == 0 and main(["train", str(config)]) == 0
    run = place / "runs" / "scratch"
    bundle = load_bundle(run / "bundle")
    assert bundle.description.modes == ("ar", "nar") and bundle.description.length_trained
    assert bundle.provenance["selected_by"] == "written/nar/rougeL"
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    tags = events.Tags()
    for mode in ("ar", "nar"):
        for name in ("bleu", "rouge1", "rouge2", "rougeL", "length_ratio"):
            assert [event.step for event in events.Scalars(f"written/{mode}/{name}")] == [2, 4]
        assert f"written/{mode}/text_summary" in tags["tensors"]
    assert {"loss/ar", "loss/nar", "loss/aux", "loss/kl_ar_aux", "loss/kl_nar_aux", "valid/nar"} <= set(tags["scalars"])
    best = max(events.Scalars("written/nar/rougeL"), key=lambda event: (event.value, -event.step))
    assert bundle.provenance["checkpoints"] == [best.step]
    shown = (run / "samples" / "step_000004.txt").read_text(encoding="utf-8").split("\n\n")
    assert len(shown) == 3 and all(f"\n{mode:9} " in text for text in shown for mode in ("ar", "nar"))
    err = capsys.readouterr().err
    assert "nar at step 4: " in err and "5 sentences in" in err
    for mode in ("ar", "nar"):
        command = ["generate", str(run / "bundle"), "--mode", mode, "--input", str(place / "test.src"), "--output", "-"]
        assert main([*command, "--max-length", "12"]) == 0
        assert capsys.readouterr().out.count("\n") == 10


def test_exits_are_watched(place: Path) -> None:
    code, config = begun(place, "exits", runner={"name": "hard_exit", "decoding": {"max_length": 16}})
    assert code == 0 and main(["train", str(config)]) == 0
    events = EventAccumulator(str(place / "runs" / "exits" / "tb"), size_guidance={"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("written/hard_exit/exits")] == [2, 4]
    layers = [event.value for event in events.Scalars("written/hard_exit/exit_layer")]
    assert len(layers) == 2 and all(1 <= layer <= 2 for layer in layers)


@pytest.mark.parametrize("training", ["cmlm_corr", "rdrop"])
def test_a_stopped_run_continues_to_the_same_weights(place: Path, training: str) -> None:
    """Guesses and copies draw dropout, too."""
    runner = {"name": "nar", "training": training, "decoding": {"max_length": 16}}
    changes: dict[str, Any] = {"runner": runner, "optim": {"schedule": "constant"}, "workers": 1}
    code, whole = begun(place, f"{training}-whole", **changes)
    assert code == 0
    bundle = f"bundle={place / f'{training}-whole-bundle'}"
    parts = config_at(place, f"{training}-parts", "nar", **{"train": TRAIN, **changes})
    assert main(["train", str(whole), bundle]) == 0
    assert main(["train", str(parts), bundle, "train.steps=2"]) == 0
    assert main(["train", str(parts), bundle]) == 0
    one, two = (weights(load_bundle(place / "runs" / f"{training}-{name}" / "bundle")) for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)

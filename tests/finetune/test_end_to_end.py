"""A random bundle is tuned for a few steps in both ways, writes, and is scored; resume, refusals and exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetune import runners
from finetune.__main__ import main
from finetune.runners.hard_exit import HardExitRunner
from finetune.runners.soft_exit import SoftExit
from pretrain.bundles.bundle import load_bundle, write_bundle
from pretrain.bundles.description import Description, Mode
from pretrain.config import ModelConfig
from pretrain.data.tokenizer import TextTokenizer, train_bpe
from pretrain.models import EncoderDecoder, SpecialIds
from pretrain.models.patterns import ArLayout, Layout

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
PAIRS = [(f"{a} {b} {c}", f"{c} {a}") for a in WORDS[:6] for b in WORDS[3:9] for c in WORDS[6:]]


def bundle_at(
    folder: Path, modes: tuple[Mode, ...], layout: Layout, seed: int = 0, trained: bool = True, init_std: float = 0.02
) -> Path:
    tokenizer: TextTokenizer = train_bpe([" ".join(pair) for pair in PAIRS], 300)
    ids = SpecialIds(tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.mask, tokenizer.unk)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=16, encoder_layers=1, decoder_layers=2, heads=2, ffn_dim=32,
        max_positions=64, length_classes=32, init_std=init_std,
    )  # fmt: skip
    torch.manual_seed(seed)
    weights = EncoderDecoder(config, ids).state_dict()
    name = "lplm" if "hard_exit" in modes else "janus" if "ar" in modes else "denoise"
    description = Description(
        config, ids, ArLayout.aligned(layout, ids), modes, {"name": name}, max_source=24, length_trained=trained
    )
    return write_bundle(folder, weights, description, tokenizer, {"run": "random"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    bundle_at(folder / "janus", ("ar", "nar"), "bos_first")
    bundle_at(folder / "bart", ("causal",), "eos_first")
    bundle_at(folder / "lengthless", ("ar", "nar"), "bos_first", trained=False)
    lines = [f"{source}\t{target}\n" for source, target in PAIRS]
    (folder / "train.tsv").write_text("".join(lines[20:]), encoding="utf-8")
    (folder / "valid.tsv").write_text("".join(lines[:10]), encoding="utf-8")
    (folder / "test.src").write_text("".join(f"{source}\n" for source, _ in PAIRS[10:20]), encoding="utf-8")
    (folder / "test.tgt").write_text("".join(f"{target}\n" for _, target in PAIRS[10:20]), encoding="utf-8")
    return folder


def config_at(place: Path, name: str, runner_name: str, bundle: str = "janus", **changes: Any) -> Path:
    values = {
        "name": name, "runs": str(place / "runs"), "bundle": str(place / bundle),
        "task": {
            "name": "pairs", "train": str(place / "train.tsv"), "valid": str(place / "valid.tsv"),
            "test": [str(place / "test.src"), str(place / "test.tgt")],
        },
        "runner": {"name": runner_name, "decoding": {"max_length": 16}},
        "max_source": 32, "max_target": 16, "shown": 3, "batch": {"samples": 8},
        "train": {"steps": 3, "save_every": 2, "validate_every": 2, "sample_every": 3, "log_every": 1},
        **changes,
    }  # fmt: skip
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("runner", "bundle", "modes"),
    [
        ("ar", "janus", ("ar",)),
        ("nar", "janus", ("nar",)),
        ("ar", "bart", ("causal",)),
        ("nar", "bart", ("nar",)),
        ("soft_exit", "janus", ("soft_exit",)),
    ],
)
def test_tune_generate_score(
    place: Path, runner: str, bundle: str, modes: tuple[Mode, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{bundle}-{runner}"
    assert main(["train", str(config_at(place, name, runner, bundle))]) == 0
    run = place / "runs" / name
    tuned, start = load_bundle(run / "bundle"), load_bundle(place / bundle)
    assert tuned.description.modes == modes
    assert tuned.description.layout == start.description.layout
    assert tuned.description.max_source == 32 and tuned.description.length_trained == (runner == "nar")
    assert not torch.equal(tuned.model.shared.weight, start.model.shared.weight)
    assert tuned.provenance["tuned_from"] == {"run": "random"}
    assert (run / "samples" / "step_000003.txt").read_text(encoding="utf-8").count("target") == 3
    assert list((run / "tb").iterdir())
    assert (run / "task" / "test.source").read_text() == (place / "test.src").read_text()
    capsys.readouterr()

    hypotheses = place / f"{name}.hyp"
    arguments = ["generate", str(run / "bundle"), "--mode", runner, "--input", str(place / "test.src")]
    assert main([*arguments, "--output", str(hypotheses), "--max-length", "16"]) == 0
    assert "decoder passes a batch" in capsys.readouterr().err
    lines = hypotheses.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10
    # one source a batch gives the same texts in the same order
    assert main([*arguments, "--output", str(place / "single"), "--max-length", "16", "--batch-tokens", "1"]) == 0
    assert (place / "single").read_text(encoding="utf-8").splitlines() == lines

    capsys.readouterr()
    scored = ["score", "--task", "pairs", "--hyp", str(hypotheses), "--ref", str(place / "test.tgt"), "--json"]
    assert main(scored) == 0
    assert set(json.loads(capsys.readouterr().out)["scores"]) == {"bleu", "rouge1", "rouge2", "rougeL"}


def test_a_stopped_run_continues_to_the_same_weights(place: Path) -> None:
    changes: dict[str, Any] = {"train": {"steps": 4, "save_every": 2}, "optim": {"schedule": "constant"}, "workers": 1}
    whole, parts = (config_at(place, name, "nar", **changes) for name in ("whole", "parts"))
    assert main(["train", str(whole)]) == 0
    assert main(["train", str(parts), "train.steps=2"]) == 0
    assert main(["train", str(parts)]) == 0
    assert '"event": "resume"' in (place / "runs" / "parts" / "events.jsonl").read_text(encoding="utf-8")
    one, two = (load_bundle(place / "runs" / name / "bundle").model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_generation_does_not_see_references(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = place / "alone"
    hidden.mkdir()
    (hidden / "test.src").write_text((place / "test.src").read_text())
    made = []
    for source in (place / "test.src", hidden / "test.src"):
        capsys.readouterr()
        command = ["generate", str(place / "janus"), "--mode", "nar", "--input", str(source), "--output", "-"]
        assert main([*command, "--max-length", "12", "--iterations", "2"]) == 0
        made.append(capsys.readouterr())
    assert made[0].out == made[1].out and made[0].out.count("\n") == 10
    assert ", 3 decoder passes a batch" in made[0].err


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["generate", "BART", "--mode", "nar", "--input", "IN", "--output", "-"], 2, "needs a bundle with mode nar"),
        (
            ["generate", "JANUS", "--mode", "nar", "--input", "IN", "--output", "-", "--beam", "2"],
            2,
            "`--beam` must not",
        ),
        (
            ["generate", "UNTRAINED", "--mode", "nar", "--input", "IN", "--output", "-"],
            2,
            "needs a trained length predictor",
        ),
        (["generate", "NONE", "--mode", "ar", "--input", "IN", "--output", "-"], 5, "there is no such folder"),
        (["generate", "JANUS", "--mode", "ar", "--input", "NONE", "--output", "-"], 4, "must be a UTF-8 text file"),
        (["generate", "JANUS", "--mode", "ar", "--input", "IN", "--output", "-", "--max-length", "65"], 3, "positions"),
        (["score", "--task", "pairs", "--hyp", "IN", "--ref", "TSV"], 4, "must have as many lines as"),
        (["score", "--task", "nothing", "--hyp", "IN", "--ref", "IN"], 3, "`task.name` must be one of"),
    ],
)
def test_refusals_are_one_line(
    place: Path, command: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"BART": "bart", "JANUS": "janus", "UNTRAINED": "lengthless", "IN": "test.src", "TSV": "train.tsv"}
    names["NONE"] = "absent"
    assert main([str(place / names[word]) if word in names else word for word in command]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_source": 65}, "`max_source` must be at most the bundle's 64 positions, got 65"),
        (
            {"runner": {"name": "soft_exit", "rows": 14}},
            "`runner.rows` must be at least 15, the `max_target` of 16 without BOS, got 14",
        ),
        ({"runner": {"name": "hard_exit", "rows": 14}}, "`max_target` of 16 without BOS, got 14"),
        ({"runner": {"name": "soft_exit", "rows": 64}}, "`runner.rows` must be at most 63, the bundle's 64 positions"),
        ({"runner": {"name": "soft_exit", "rows": "target"}}, "must be a number or `longest` with soft_exit"),
        ({"runner": {"name": "narr"}}, "`runner.name` must be one of ar, nar,"),
        ({"runner": {"name": "nar", "decoding": {"iteration": 1}}}, "did you mean `decoding.iterations`?"),
        ({"bundl": "x"}, "unknown key `bundl`; did you mean `bundle`?"),
    ],
)
def test_bad_configurations(
    place: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config_at(place, "bad", "nar", **changes))]) == 3
    assert message in capsys.readouterr().err


def test_a_run_refuses_another_task(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_at(place, "fixed", "nar", train={"steps": 2, "save_every": 2})
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "seed=7"]) == 3
    assert "`seed` must stay 1" in capsys.readouterr().err
    # what only concerns validation may change
    assert main(["train", str(config), "runner.decoding.iterations=2"]) == 0


def test_another_bundle_under_the_same_name_does_not_continue(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle_at(place / "mutable", ("ar", "nar"), "bos_first")
    config = config_at(place, "mutated", "nar", "mutable", train={"steps": 1, "save_every": 1})
    assert main(["train", str(config)]) == 0
    bundle_at(place / "mutable", ("ar", "nar"), "bos_first", seed=1)
    capsys.readouterr()
    assert main(["train", str(config), "train.steps=2"]) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert "`bundle_sha256` was " in error and "`bundle, task` must give the data" in error
    bundle_at(place / "mutable", ("ar", "nar"), "bos_first")
    assert main(["train", str(config), "train.steps=2"]) == 0


def test_long_sources_are_cut_to_what_the_bundle_was_trained_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [" ".join(WORDS * 2), " ".join([*reversed(WORDS)] * 2), "alpha beta"]
    tokenizer = load_bundle(place / "janus").tokenizer
    lengths = [len(tokens) for tokens in tokenizer.encode_batch(words)]
    assert min(lengths[:2]) > 22 > lengths[2]
    shortened = [tokenizer.decode(tokenizer.encode(text)[:22]) for text in words]
    made = []
    for name, texts in (("long", words), ("short", shortened)):
        (place / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        command = ["generate", str(place / "janus"), "--mode", "nar", "--input", str(place / name), "--output", "-"]
        assert main([*command, "--max-length", "12"]) == 0
        made.append(capsys.readouterr())
    assert made[0].out == made[1].out
    assert "2 sources cut to 24 tokens" in made[0].err and "cut" not in made[1].err


def test_nar_is_not_tuned_without_its_length_predictor(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_at(place, "lengthless-nar", "nar", runner={"name": "nar", "length_weight": 0.0})
    assert main(["train", str(config)]) == 3
    assert "`length_weight` must be greater than 0" in capsys.readouterr().err


@pytest.mark.parametrize("runner", ["hard_exit", "soft_exit"])
def test_a_tuned_bundle_writes_with_the_rows_of_tuning(place: Path, runner: str) -> None:
    """Generation without options, and validation with shorter texts than were tuned."""
    options = {"name": runner, "rows": 20, "decoding": {"max_length": 9}}
    path = config_at(place, f"rows-{runner}", runner, runner=options, train={"steps": 1, "save_every": 1})
    assert main(["train", str(path)]) == 0
    description = load_bundle(place / "runs" / f"rows-{runner}" / "bundle").description
    assert description.objective["rows"] == 20
    later = runners.build({"name": runner, "decoding": {}}, description)
    assert isinstance(later, HardExitRunner | SoftExit) and later.decoding.max_length == 21
    # what only concerns validation may change, and changes nothing else
    assert main(["train", str(path), "runner.decoding.max_length=12", "train.steps=2"]) == 0
    again = load_bundle(place / "runs" / f"rows-{runner}" / "bundle").description
    assert again == description

"""Continued pre-training: a run begins with the weights of a bundle, and is told where that cannot be."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from finetune.__main__ import main as finetune
from pretrain import config
from pretrain.__main__ import main
from pretrain.assemble import build_module, complete_config, with_steps
from pretrain.bundles.bundle import load_bundle
from pretrain.config import RunConfig, TrainConfig
from pretrain.data.dataset import ShardDataset
from pretrain.data.order import BlendedOrder
from pretrain.data.plan import BatchSize, plan_step
from pretrain.data.prepare import prepare
from pretrain.data.stream import ShardCorpus
from pretrain.data.tokenizer import TextTokenizer
from pretrain.models import SourceRows
from pretrain.models.patterns import causal
from pretrain.models.rows import pack_streams
from tests.pretrain.bundles.test_bart import make_theirs, padded_logits
from tests.pretrain.runs import write_config, write_text

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """data/ with a tokenizer of its own, hf/ a BART for that tokenizer, bart/ its bundle."""
    place = tmp_path_factory.mktemp("continued")
    source = f"words=text:{write_text(place / 'words.txt', 300)}"
    prepare(place / "data", [source], train_vocab=300, max_length=32)
    save_theirs(place)
    assert main(["import-bart", str(place / "hf"), "--out", str(place / "bart")]) == 0
    return place


def save_theirs(place):
    tokenizer = TextTokenizer.from_path(place / "data")
    theirs = make_theirs(vocab_size=tokenizer.vocab_size + 3, dropout=0.2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(0.1)  # small enough to be trained on
    theirs.save_pretrained(place / "hf")
    tokenizer.save(place / "hf")


def settings_at(place, *overrides, runs=None):
    path = write_config(runs or place, place / "data")
    values = yaml.safe_load(path.read_text())
    del values["model"]
    values |= {"init_from": str(place / "bart"), "objective": {"name": "janus", "ar_layout": "eos_first"}}
    path.write_text(yaml.safe_dump(values))
    return path, config.load(RunConfig, path, overrides)


@pytest.mark.parametrize("objective", ["janus", "denoise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_0_has_barts_logits_on_the_content_stream(objective, dtype, place, tmp_path):
    _, settings = settings_at(place, f"objective.name={objective}", runs=tmp_path)
    dataset = ShardDataset(place / "data")
    settings = complete_config(settings, dataset)
    module = build_module(settings, dataset).to(dtype).eval()
    model, objective = module.model, module.objective
    examples = [
        objective.corrupt(dataset.tokens(number), dataset.sentences(number), np.random.default_rng(number))
        for number in range(5)
    ]
    batch = objective.collate(examples)
    contents = [objective.layout.content(example.target) for example in examples]
    theirs = transformers.BartForConditionalGeneration.from_pretrained(place / "hf").to(dtype).eval()
    right = padded_logits(theirs, [example.source for example in examples], contents)
    with torch.no_grad():
        memory = model.encode(batch.source)
        if objective.modes[0] == "causal":  # the very rows that are trained
            found = model.logits(model.decode(batch.rows, memory))
        else:
            source = SourceRows.pack([example.source for example in examples])
            streams = [causal(e.target, source.memory_range(i), objective.layout, 0) for i, e in enumerate(examples)]
            found = model.logits(model.decode(pack_streams(streams, source.mask.n_rows)[0], memory))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert torch.allclose(found, right, rtol=tolerance, atol=tolerance)


def test_the_shape_is_the_bundles_and_dropouts_may_be_chosen(place, tmp_path):
    dataset = ShardDataset(place / "data")
    bundle = load_bundle(place / "bart").description.model
    _, settings = settings_at(place, runs=tmp_path)
    assert complete_config(settings, dataset).model == bundle
    _, settings = settings_at(
        place, "model.attention_dropout=0.3", "model.heads=2", "model.vocab_size=null", runs=tmp_path
    )
    completed = complete_config(settings, dataset).model
    assert completed == bundle.model_copy(update={"attention_dropout": 0.3}) and completed.dropout == 0.2
    module = build_module(complete_config(settings, dataset), dataset)
    assert module.model.encoder.layers[0].self_attn.dropout == 0.3
    assert config.load(RunConfig, saved(tmp_path, complete_config(settings, dataset))).model == completed


def saved(folder, settings):
    (folder / "saved.yaml").write_text(config.dump(settings))
    return folder / "saved.yaml"


def test_cmlm_has_no_layout_to_contradict(place, tmp_path):
    path, _ = settings_at(place, runs=tmp_path)
    values = yaml.safe_load(path.read_text()) | {"objective": {"name": "cmlm"}}
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path), "train.steps=1", "train.validate_every=0", "train.sample_every=0"]) == 0


REFUSALS = {
    "another width": (["model.d_model=32"], 3, "`model.d_model` must be 16 or absent, as in"),
    "a default, but given": (["model.encoder_layers=3"], 3, "`model.encoder_layers` must be 1 or absent"),
    "several": (
        ["model.d_model=32", "model.dropout=0.3", "model.activation=relu"],
        3,
        "`, got 'relu'; `model.d_model` must be 16 or absent, as in",
    ),
    "another layout": (["objective.ar_layout=bos_first"], 3, "`objective.ar_layout` must be eos_first, as in"),
    "no bundle": (["init_from=nowhere"], 5, "bundle `nowhere`: there is no such folder"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_contradictions_are_one_line(what, place, tmp_path, capsys):
    overrides, code, message = REFUSALS[what]
    path, _ = settings_at(place, runs=tmp_path)
    assert main(["train", str(path), *overrides]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_data_of_another_tokenizer_is_refused(place, tmp_path, capsys):
    source = f"words=text:{place / 'words.txt'}"
    prepare(tmp_path / "other", [source], train_vocab=290, max_length=32)
    path, _ = settings_at(place, runs=tmp_path)
    assert main(["train", str(path), f"data.path={tmp_path / 'other'}"]) == 4
    assert f"must be made with the tokenizer of `{place / 'bart'}`" in capsys.readouterr().err


def test_bart_to_janus_and_back(place, tmp_path, capsys):
    """The whole way: import, continue, resume without the bundle, hand off, export; transformers has our logits."""
    shutil.copytree(place / "bart", tmp_path / "start")
    path, _ = settings_at(place, runs=tmp_path)
    given = [f"init_from={tmp_path / 'start'}", "train.steps=3", "train.save_every=2", "optim.lr=1e-3"]
    run = tmp_path / "runs" / "tiny"
    assert main(["train", str(path), *given]) == 0
    assert f"begun with those of {tmp_path / 'start'}" in capsys.readouterr().err
    assert config.load(RunConfig, run / "config.yaml").init_from == str(tmp_path / "start")
    shutil.rmtree(tmp_path / "start")  # the checkpoint wins
    assert main(["train", str(path), *given, "train.steps=4"]) == 0
    assert "continuing at step 3" in capsys.readouterr().err
    assert main(["train", str(path), *given, f"init_from={place / 'bart'}"]) == 3
    assert "`init_from` must stay" in capsys.readouterr().err

    assert main(["handoff", str(run), "--out", str(tmp_path / "janus")]) == 0
    assert main(["export-bart", str(tmp_path / "janus"), "--out", str(tmp_path / "out")]) == 0
    provenance = json.loads((tmp_path / "janus" / "provenance.json").read_text())
    assert provenance["config"]["init_from"] == str(tmp_path / "start") and provenance["step"] == 4
    bundle = load_bundle(tmp_path / "janus")
    assert bundle.description.modes == ("ar", "nar") and bundle.description.layout.layout == "eos_first"
    before, after = load_file(place / "bart" / "model.safetensors"), load_file(tmp_path / "janus" / "model.safetensors")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert 0 < max(moved.values()) < 0.05, "four small updates of BART's weights, not weights of another origin"
    assert torch.equal(after["head.bias_V"], before["head.bias_V"])

    theirs = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("A small red cat")["input_ids"]
    assert ids == [0, *bundle.tokenizer.encode("A small red cat"), 2]
    target = np.array(ids)
    source = SourceRows.pack([target])
    rows, _, _ = pack_streams([causal(target, source.memory_range(0), bundle.description.layout, 0)], len(target))
    with torch.no_grad():
        found = bundle.model.logits(bundle.model.decode(rows, bundle.model.encode(source)))
    right = padded_logits(theirs, [target], [bundle.description.layout.content(target)])
    assert torch.allclose(found, right, rtol=1e-4, atol=1e-5)


def test_an_imported_bart_can_be_tuned_left_to_right_at_once(place, tmp_path, capsys):
    lines = [f"the {word} cat\tthe {word} dog\n" for word in ("small", "red", "quick")]
    (tmp_path / "pairs.tsv").write_text("".join(lines))
    values = {
        "name": "ar", "runs": str(tmp_path), "bundle": str(place / "bart"), "max_source": 30, "max_target": 30,
        "task": {"name": "pairs", "train": str(tmp_path / "pairs.tsv")}, "batch": {"samples": 2},
        "runner": {"name": "ar", "decoding": {"max_length": 30}}, "train": {"epochs": 2.0},
    }  # fmt: skip
    (tmp_path / "ar.yaml").write_text(yaml.safe_dump(values))
    assert finetune(["train", str(tmp_path / "ar.yaml")]) == 0
    assert "3 of 3 updates to do, 2.0 epochs in all" in capsys.readouterr().err
    tuned = load_bundle(tmp_path / "ar" / "bundle").description
    assert tuned.modes == ("causal",) and tuned.layout.layout == "eos_first"


# ------------------------------------------------------------------------------------------------------------ epochs


def passed(order, corpus, batch, steps):
    """Epochs after `steps` updates, by walking through them."""
    position = 0
    for _ in range(steps):
        position += plan_step(order, corpus, position, 1, batch).count
    return order.epoch(position)


@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("samples", [1, 7, 64, 1000])
def test_epochs_in_samples_are_exact(epochs, samples, place):
    corpus = ShardCorpus(ShardDataset(place / "data"), "train")
    order, batch = BlendedOrder(corpus.sizes, None, 1), BatchSize(samples, None, 10_000)
    train = with_steps(TrainConfig(epochs=epochs, save_every=5), order, corpus, batch)
    assert train.epochs is None and train.save_every == 5
    assert passed(order, corpus, batch, train.steps) >= epochs > passed(order, corpus, batch, train.steps - 1)


def test_epochs_in_tokens_are_close(place):
    corpus = ShardCorpus(ShardDataset(place / "data"), "train")
    order, batch = BlendedOrder(corpus.sizes, None, 1), BatchSize(None, 300, 10_000)
    train = with_steps(TrainConfig(epochs=2.0), order, corpus, batch)
    assert passed(order, corpus, batch, train.steps) == pytest.approx(2.0, rel=0.03)
    assert with_steps(TrainConfig(steps=9), order, corpus, batch).steps == 9


def test_a_run_of_epochs_is_recorded_in_steps(place, tmp_path, capsys):
    path, _ = settings_at(place, runs=tmp_path)
    overrides = ["train.steps=null", "train.epochs=0.1", "train.validate_every=0", "train.sample_every=0"]
    samples = sum(ShardCorpus(ShardDataset(place / "data"), "train").sizes)
    steps = -(-samples // 60)
    assert main(["train", str(path), *overrides]) == 0
    assert f"{steps} of {steps} updates to do" in capsys.readouterr().err
    assert config.load(RunConfig, tmp_path / "runs/tiny/config.yaml").train.steps == steps
    assert main(["train", str(path), *overrides]) == 0, "the same command goes on"


@pytest.mark.parametrize("both", [{"steps": 5, "epochs": 1.0}, {"steps": 0}, {"steps": None}])
def test_the_length_of_a_run_is_given_once(both):
    message = f"`steps` and `epochs`, `steps` at least 1, got {both['steps']} and {both.get('epochs')}"
    with pytest.raises(config.ConfigError, match=message):
        config.validate(TrainConfig, both, where="x")

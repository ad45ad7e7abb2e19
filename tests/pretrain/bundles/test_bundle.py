"""The hand-off bundle: written, read back, proven by its golden logits, and refused when anything is off."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.bundles.bundle import content_sha256, load_bundle, write_bundle
from pretrain.bundles.description import Description, from_bart, to_bart
from pretrain.checkpoints.seal import seal_folder
from pretrain.config import ModelConfig
from pretrain.data.tokenizer import train_bpe
from pretrain.errors import CheckpointError
from pretrain.models import EncoderDecoder, SpecialIds
from pretrain.models.patterns import ArLayout

TOKENIZER = train_bpe(["a tiny text for a tiny tokenizer, of a few words"], 280)
IDS = SpecialIds(TOKENIZER.bos, TOKENIZER.pad, TOKENIZER.eos, TOKENIZER.mask, TOKENIZER.unk)


def describe(layout="bos_first", **shape):
    given = {"vocab_size": TOKENIZER.vocab_size, "d_model": 8, "encoder_layers": 1, "decoder_layers": 2, "heads": 2,
             "ffn_dim": 16, "max_positions": 32, **shape}  # fmt: skip
    objective = {"name": "janus", "ar_layout": layout}
    return Description(ModelConfig(**given), IDS, ArLayout.aligned(layout, IDS), ("ar", "nar"), objective)


def make(folder, description=None):
    description = description or describe()
    torch.manual_seed(3)
    model = EncoderDecoder(description.model, IDS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    write_bundle(folder, model.state_dict(), description, TOKENIZER, {"step": 5})
    return model


@pytest.fixture
def bundle(tmp_path):
    make(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize(
    "shape",
    [{}, {"norm": "pre", "positions": "sinusoidal", "embed_norm": False}, {"logits_bias": True, "embed_scale": True}],
    ids=["bart", "pre-norm", "bias"],
)
@pytest.mark.parametrize("layout", ["bos_first", "eos_first"])
def test_round_trip(layout, shape, tmp_path):
    description = describe(layout, **shape)
    model = make(tmp_path / "b", description)
    read = load_bundle(tmp_path / "b")
    assert read.golden_error == 0.0 and read.description == description
    assert read.tokenizer.sha256 == TOKENIZER.sha256 and read.provenance == {"step": 5}
    assert not read.model.training and read.model.head.weight is read.model.shared.weight
    for name, value in model.state_dict().items():
        assert torch.equal(read.model.state_dict()[name], value), name
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "golden.safetensors", "manifest.json",
        "model.safetensors", "provenance.json", "tokenizer.json",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["b"], "nothing is left beside it"


def test_names_and_fields_are_barts(bundle):
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(**{k: v for k, v in read_json(bundle).items() if k != "parlance"})
    theirs = transformers.BartModel(config)
    ours = load_file(bundle / "model.safetensors")
    assert "head.weight" not in ours
    extra = ours.keys() - theirs.state_dict().keys()
    assert extra == {"length_head.weight"}
    missing, _ = theirs.load_state_dict(ours, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    fields = read_json(bundle)
    assert fields["decoder_start_token_id"] == IDS.bos
    assert transformers.GenerationConfig.from_pretrained(bundle).decoder_start_token_id == IDS.bos


def test_eos_first_starts_as_bart_does(tmp_path):
    make(tmp_path / "b", describe("eos_first"))
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert (generation["decoder_start_token_id"], generation["forced_bos_token_id"]) == (IDS.eos, IDS.bos)


def read_json(bundle):
    return json.loads((bundle / "config.json").read_text())


def edit(bundle, **changes):
    values = read_json(bundle)
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (values[section] if section else values)[name] = value
    (bundle / "config.json").write_text(json.dumps(values))


def tensors(bundle, change):
    values = load_file(bundle / "model.safetensors")
    change(values)
    save_file(values, bundle / "model.safetensors")


def spoil(values):
    values["decoder.layers.1.fc1.weight"][0, 0] += 0.5


DAMAGE = {
    "another model type": (lambda b: edit(b, model_type="t5"), "`model_type` is 't5'"),
    "no section of ours": (lambda b: edit(b, parlance=None), "must describe a Parlance bundle"),
    "another architecture": (lambda b: edit(b, parlance__architecture="Mamba"), "architecture"),
    "a newer format": (lambda b: edit(b, parlance__format=3), "format"),
    "another width": (lambda b: edit(b, d_model=16), "must be (280, 16), is (280, 8)"),
    "more layers": (lambda b: edit(b, decoder_layers=3), "it lacks `decoder.layers.2"),
    "fewer layers": (lambda b: edit(b, decoder_layers=1), "the model has no `decoder.layers.1"),
    "unequal heads": (lambda b: edit(b, decoder_attention_heads=4), "must be equal"),
    "other heads": (lambda b: edit(b, decoder_attention_heads=4, encoder_attention_heads=4), "differs by"),
    "another activation": (lambda b: edit(b, activation_function="relu"), "differs by"),
    "another layout": (lambda b: edit(b, parlance__ar_query_position_offset=0), "differs by"),
    "a source beyond the positions": (lambda b: edit(b, parlance__max_source=33), "`max_source` must be"),
    "nothing about its length predictor": (lambda b: edit(b, parlance__length_trained=None), "length_trained"),
    "a weight that changed": (lambda b: tensors(b, spoil), "differs by"),
    "a tensor that is missing": (lambda b: tensors(b, lambda v: v.pop("shared.weight")), "it lacks `shared.weight`"),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no config": (lambda b: (b / "config.json").unlink(), "lacks config.json"),
    "no golden": (lambda b: (b / "golden.safetensors").unlink(), "lacks golden.safetensors"),
    "no tokenizer": (lambda b: (b / "tokenizer.json").unlink(), "tokenizer"),
    "cut weights": (lambda b: (b / "model.safetensors").write_bytes(b"\x08"), "cannot be read"),
    "config that is no JSON": (lambda b: (b / "config.json").write_text("{"), "cannot be read"),
    "an id beyond the vocabulary": (lambda b: edit(b, parlance__mask_token_id=9999), "must exceed every special id"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_bundle_that_is_not_what_it_says_is_refused_in_one_line(what, bundle):
    """Sealed anew after the damage: what it holds is refused, not only that it changed."""
    damage, message = DAMAGE[what]
    damage(bundle)
    seal_folder(bundle, step=0)
    with pytest.raises(CheckpointError) as refused:
        load_bundle(bundle)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_lowest_bit_of_a_weight_is_noticed(bundle):
    """The golden logits alone would not: they change by less than another machine's sums do."""
    content = bytearray((bundle / "model.safetensors").read_bytes())
    content[-4] ^= 1
    (bundle / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not as it was written: model.safetensors: sha256 must be"):
        load_bundle(bundle)
    seal_folder(bundle, step=0)
    load_bundle(bundle)


def test_a_bundle_without_a_seal_is_refused(bundle):
    (bundle / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not as it was written: manifest.json is missing"):
        load_bundle(bundle)


def test_a_folder_that_is_no_bundle_is_not_overwritten(tmp_path, bundle):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not overwritten"):
        make(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "draft.txt").exists()
    (bundle / "old").write_text("of the bundle before")
    make(bundle)
    assert not (bundle / "old").exists() and load_bundle(bundle).golden_error == 0.0


def test_a_killed_write_leaves_the_old_bundle(bundle, monkeypatch):
    monkeypatch.setattr("pretrain.bundles.bundle.golden", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(bundle)
    monkeypatch.undo()
    assert load_bundle(bundle).golden_error == 0.0
    make(bundle)
    assert not list(bundle.parent.glob(".bundle.*"))


def test_description_survives_config_json():
    description = replace(describe("eos_first", norm="pre", length_classes=77), max_source=20, length_trained=True)
    assert from_bart(json.loads(json.dumps(to_bart(description))), where="x") == description


def test_the_longest_source_is_the_trained_one_or_all_positions():
    assert describe().longest_source == 32
    assert replace(describe(), max_source=20).longest_source == 20


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "golden.safetensors"])
def test_content_hash_notices_every_change(file, bundle, tmp_path):
    before = content_sha256(bundle)
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "copy" / "provenance.json").write_text("{}")
    assert content_sha256(tmp_path / "copy") == before
    with (tmp_path / "copy" / file).open("ab") as content:
        content.write(b" ")
    assert content_sha256(tmp_path / "copy") != before


def test_verify_can_be_left_out(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "copy" / "golden.safetensors").unlink()
    assert load_bundle(tmp_path / "copy", verify=False).golden_error is None

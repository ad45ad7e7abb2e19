"""BART in and out, judged by transformers: equal logits, equal bits, and a clear refusal of what cannot be said."""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.__main__ import main
from pretrain.bundles import bart
from pretrain.bundles.bart import export_bart, import_bart
from pretrain.bundles.bundle import load_bundle, write_bundle
from pretrain.bundles.description import Description
from pretrain.data.bart_tokenizer import hugging_face_files
from pretrain.data.tokenizer import train_bpe
from pretrain.errors import CheckpointError
from pretrain.models import EncoderDecoder, SourceRows, pack_streams
from pretrain.models.patterns import causal

transformers = pytest.importorskip("transformers")

TOKENIZER = train_bpe(["a tiny text for a tiny tokenizer, of a few words"], 290)
SHAPE = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 40}  # fmt: skip
SHAPES = {
    "plain": {},
    "deep encoder": {"encoder_layers": 3, "decoder_layers": 1, "dropout": 0.3, "activation_dropout": 0.05},
    "deep decoder, relu": {"decoder_layers": 3, "activation_function": "relu"},
    "scaled, four heads": {"scale_embedding": True, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "wide, larger vocabulary": {"d_model": 32, "vocab_size": 333, "attention_dropout": 0.2},
    "starts with <s>": {"decoder_start_token_id": 0},
}


def make_theirs(bias=True, **shape):
    torch.manual_seed(5)
    config = transformers.BartConfig(**{"vocab_size": TOKENIZER.vocab_size, **SHAPE, **shape})
    model = transformers.BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        if bias:
            model.final_logits_bias.normal_()
    return model


def save(model, folder):
    model.save_pretrained(folder)
    for name, content in hugging_face_files(TOKENIZER.json_text, 40).items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(make_theirs(), tmp_path / "hf")


def padded_logits(model, sources, contents):
    """transformers' logits of ragged samples in one padded batch, the real rows one behind the other."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.from_numpy(s) for s in sources], batch_first=True, padding_value=1)
    mask = pad([torch.ones(len(s), dtype=torch.int64) for s in sources], batch_first=True)
    decoder = pad([torch.from_numpy(c) for c in contents], batch_first=True, padding_value=1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
    return torch.cat([row[: len(c)] for row, c in zip(logits, contents, strict=True)])


def packed_logits(model, layout, sources, targets):
    rows = SourceRows.pack(sources)
    streams = [causal(target, rows.memory_range(i), layout, term=0) for i, target in enumerate(targets)]
    packed, _, _ = pack_streams(streams, rows.mask.n_rows)
    with torch.no_grad():
        return model.logits(model.decode(packed, model.encode(rows)))


def ragged(vocabulary, lengths):
    draw = np.random.default_rng(2)
    return [np.concatenate([[0], draw.integers(3, vocabulary, length), [2]]) for length in lengths]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_logits_are_equal_both_ways_and_the_round_trip_is_bit_identical(shape, bias, tmp_path):
    theirs = make_theirs(bias, **SHAPES[shape])
    save(theirs, tmp_path / "hf")
    import_bart(str(tmp_path / "hf"), tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    description, config = bundle.description, bundle.description.model
    assert bundle.golden_error == 0.0 and description.modes == ("causal",) and config.logits_bias is bias
    assert bundle.model.head.weight is bundle.model.shared.weight
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (
        theirs.config.dropout, theirs.config.attention_dropout, theirs.config.activation_dropout)  # fmt: skip
    layout = "bos_first" if shape == "starts with <s>" else "eos_first"
    assert description.layout.layout == description.objective["ar_layout"] == layout
    assert not bundle.model.length_head.weight.any()

    vocabulary = theirs.config.vocab_size
    sources, targets = ragged(vocabulary, (5, 30, 0, 17)), ragged(vocabulary, (28, 3, 9, 1))
    contents = [description.layout.content(target) for target in targets]
    right = padded_logits(theirs, sources, contents)
    found = packed_logits(bundle.model, description.layout, sources, targets)
    assert torch.allclose(found, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
    exact = packed_logits(bundle.model.double(), description.layout, sources, targets)
    assert torch.allclose(exact, padded_logits(theirs.double(), sources, contents), rtol=1e-10, atol=1e-10)

    export_bart(tmp_path / "bundle", tmp_path / "out")
    assert file_bits(tmp_path / "out") == file_bits(tmp_path / "hf")
    again, report = transformers.BartForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    assert again.lm_head.weight is again.model.shared.weight is again.model.encoder.embed_tokens.weight
    assert torch.equal(padded_logits(again, sources, contents), padded_logits(theirs.float(), sources, contents))
    for name in ("encoder_layers", "scale_embedding", "activation_function", "dropout", "decoder_start_token_id"):
        assert getattr(again.config, name) == getattr(theirs.config, name), name


def file_bits(folder):
    """{name: bits}: two files are equal to the last bit, NaNs and signs of zero included."""
    return {name: value.numpy().tobytes() for name, value in load_file(folder / "model.safetensors").items()}


def test_an_export_comes_back_as_the_same_bundle(folder, tmp_path):
    import_bart(str(folder), tmp_path / "a")
    export_bart(tmp_path / "a", tmp_path / "out")
    import_bart(str(tmp_path / "out"), tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert load_bundle(tmp_path / "a").description == load_bundle(tmp_path / "b").description
    assert load_bundle(tmp_path / "b").tokenizer.sha256 == TOKENIZER.sha256
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("a tiny word")["input_ids"] == [0, *TOKENIZER.encode("a tiny word"), 2]


# ------------------------------------------------------------------------------------------------ other ways to store


def as_pickle(folder):
    torch.save(make_theirs().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_bare_model(folder):
    """Names without `model.`, as facebook/bart-base has them; no bias."""
    weights = load_file(folder / "model.safetensors")
    del weights["final_logits_bias"]
    save_file({name.removeprefix("model."): value for name, value in weights.items()}, folder / "model.safetensors")


def as_shards(folder, pickled=False):
    weights, suffix = load_file(folder / "model.safetensors"), "bin" if pickled else "safetensors"
    stem, names = ("pytorch_model" if pickled else "model"), sorted(weights)
    where = {name: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(names)}
    for file in set(where.values()):
        part = {name: weights[name] for name in names if where[name] == file}
        torch.save(part, folder / file) if pickled else save_file(part, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()


def as_half(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, folder / "model.safetensors")


STORED = {
    "pickle": as_pickle,
    "no prefix": as_bare_model,
    "shards": as_shards,
    "pickled shards": lambda folder: as_shards(folder, pickled=True),
    "fp16": as_half,
}


@pytest.mark.parametrize("how", STORED)
def test_every_way_to_store_weights_is_read(how, folder, tmp_path):
    right = load_file(folder / "model.safetensors")
    STORED[how](folder)
    import_bart(str(folder), tmp_path / "b")
    found = load_file(tmp_path / "b" / "model.safetensors")
    bias = found.pop("head.bias_V", None)
    assert (bias is None) == (how == "no prefix")
    del found["length_head.weight"]
    for name, value in found.items():
        stored = right[f"model.{name}"]
        assert torch.equal(value, stored.half().float() if how == "fp16" else stored), name


# --------------------------------------------------------------------------------------------------------- fairseq


def as_fairseq(theirs, path, newer=False, **changes):
    """A checkpoint as fairseq writes it: other names, options in a Namespace, an optimizer beside the weights."""
    c = theirs.config
    options = {
        "arch": "bart_base", "activation_fn": c.activation_function, "no_scale_embedding": not c.scale_embedding,
        "dropout": c.dropout, "attention_dropout": c.attention_dropout, "relu_dropout": 0.0,
        "layernorm_embedding": True, "share_all_embeddings": True,
    }  # fmt: skip
    for half in ("encoder", "decoder"):
        options |= {f"{half}_attention_heads": c.encoder_attention_heads, f"{half}_ffn_embed_dim": c.encoder_ffn_dim,
                    f"{half}_normalize_before": False, f"{half}_learned_pos": True, f"{half}_layerdrop": 0}  # fmt: skip
    options = argparse.Namespace(**{**options, **changes})
    weights = {name: value.clone() for name, value in theirs.model.state_dict().items() if name != "shared.weight"}
    weights["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"].clone()
    weights |= {"encoder.version": torch.tensor([3.0]), "decoder.version": torch.tensor([3.0]),
                "encoder.embed_positions._float_tensor": torch.zeros(1)}  # fmt: skip
    content = {"args": None, "cfg": {"model": options}} if newer else {"args": options}
    extra = {"optimizer_history": [{"num_updates": 3}], "last_optimizer_state": {"step": 1, "x": torch.zeros(2)}}
    torch.save({**content, "model": weights, "extra_state": {"epoch": 2}, **extra}, path)


@pytest.mark.parametrize("newer", [False, True], ids=["args", "cfg"])
@pytest.mark.parametrize("by_name", [False, True], ids=["folder", "file"])
def test_fairseq_checkpoints_are_read(newer, by_name, tmp_path):
    theirs = make_theirs(bias=False, scale_embedding=True, encoder_layers=2, activation_function="relu")
    TOKENIZER.save(tmp_path)
    file = tmp_path / ("checkpoint_best.pt" if by_name else "model.pt")
    as_fairseq(theirs, file, newer)
    import_bart(str(file if by_name else tmp_path), tmp_path / "b")
    bundle = load_bundle(tmp_path / "b")
    assert list(bundle.provenance["files"]) == [file.name]
    sources, targets = ragged(280, (5, 30)), ragged(280, (28, 3))
    contents = [bundle.description.layout.content(target) for target in targets]
    found = packed_logits(bundle.model, bundle.description.layout, sources, targets)
    assert torch.allclose(found, padded_logits(theirs, sources, contents), rtol=1e-4, atol=1e-4)


def test_a_length_predictor_of_janus_is_kept(tmp_path):
    theirs = make_theirs(bias=False)
    TOKENIZER.save(tmp_path)
    as_fairseq(theirs, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=False)
    content["model"]["decoder.embed_length.weight"] = torch.randn(77, 16)
    torch.save(content, tmp_path / "model.pt")
    import_bart(str(tmp_path), tmp_path / "b")
    bundle = load_bundle(tmp_path / "b")
    assert torch.equal(bundle.model.length_head.weight, content["model"]["decoder.embed_length.weight"])
    assert bundle.description.model.length_classes == 77 and bundle.description.modes == ()


FAIRSEQ_REFUSALS = {
    "pre-norm": ({"encoder_normalize_before": True}, "option `encoder_normalize_before` must be False, is True"),
    "sinusoids": ({"decoder_learned_pos": False}, "option `decoder_learned_pos` must be True"),
    "other heads": ({"decoder_attention_heads": 4}, "`decoder_attention_heads` must be equal, got 2 and 4"),
    "an object for a number": ({"dropout": argparse.Namespace(a=1)}, "does not describe a BART"),
    "unknown activation": ({"activation_fn": "tanh"}, "`activation` must be 'gelu' or 'relu', got 'tanh'"),
}


@pytest.mark.parametrize("what", FAIRSEQ_REFUSALS)
def test_fairseq_options_that_bart_lacks_are_refused(what, tmp_path):
    changes, message = FAIRSEQ_REFUSALS[what]
    TOKENIZER.save(tmp_path)
    as_fairseq(make_theirs(bias=False), tmp_path / "model.pt", **changes)
    refused(str(tmp_path), tmp_path / "b", message)


# -------------------------------------------------------------------------------------------------------- refusals


def refused(path, out, message, kind=CheckpointError):
    with pytest.raises(kind) as error:
        import_bart(path, out)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path(out).exists() and not list(Path(out).parent.glob(".b.*"))


def edit(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def tensors(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def untie(weights):
    weights["lm_head.weight"] = weights["model.shared.weight"] + 1e-6


def add_adapter(weights):
    weights["model.encoder.layers.0.fc1.lora_A.weight"] = torch.zeros(2, 2)


def swap_heads(folder):
    edit(folder, decoder_attention_heads=4)


REFUSALS = {
    "another model": (lambda f: edit(f, model_type="mbart"), "`model_type` must be 'bart', is 'mbart'"),
    "no model type": (lambda f: edit(f, model_type=...), "`model_type` must be 'bart', is None"),
    "unequal heads": (swap_heads, "`encoder_attention_heads` and `decoder_attention_heads` must be equal, got 2 and 4"),
    "unequal feed-forward": (lambda f: edit(f, encoder_ffn_dim=32), "`decoder_ffn_dim` must be equal, got 32 and 24"),
    "untied by configuration": (lambda f: edit(f, tie_word_embeddings=False), "`tie_word_embeddings` must be True"),
    "untied weights": (lambda f: tensors(f, untie), "`lm_head.weight` and `shared.weight` must be one table"),
    "activation": (lambda f: edit(f, activation_function="gelu_new"), "must be 'gelu' or 'relu', got 'gelu_new'"),
    "pre-norm": (lambda f: edit(f, normalize_before=True), "`normalize_before` must be False, is True"),
    "layer drop": (lambda f: edit(f, encoder_layerdrop=0.1), "`encoder_layerdrop` must be 0.0, is 0.1"),
    "quantised": (lambda f: edit(f, quantization_config={"bits": 4}), "`quantization_config` must be None"),
    "adapter": (lambda f: tensors(f, add_adapter), "the model has no `encoder.layers.0.fc1.lora_A.weight`"),
    "odd start": (lambda f: edit(f, decoder_start_token_id=7), "`decoder_start_token_id` must be 2 or 0, is 7"),
    "other ids": (lambda f: edit(f, pad_token_id=5), "`pad_token_id` must be the tokenizer's 1, is 5"),
    "a smaller vocabulary": (lambda f: edit(f, vocab_size=200), "`vocab_size` must be at least the tokenizer's 28"),
    "a larger vocabulary": (lambda f: edit(f, vocab_size=400), "`shared.weight` must be (400, 16)"),
    "a width beyond memory": (lambda f: edit(f, d_model=10**13), "no model can be so large"),
    "a table of no dimension": (lambda f: tensors(f, lambda w: w.update({"model.shared.weight": torch.zeros(())})),
                                "it lacks `shared.weight`, a matrix"),
    "a size beyond memory": (lambda f: edit(f, vocab_size=10**13), "`shared.weight` must be (10000000000000, 16)"),
    "text for a number": (lambda f: edit(f, d_model="wide"), "does not describe a BART"),
    "a missing tensor": (lambda f: tensors(f, lambda w: w.pop("model.decoder.layers.1.fc2.bias")),
                         "it lacks `decoder.layers.1.fc2.bias`"),
    "no table": (lambda f: tensors(f, lambda w: w.pop("model.shared.weight")), "it lacks `shared.weight`"),
    "integers": (lambda f: tensors(f, lambda w: w.update({"final_logits_bias": torch.zeros(1, 3, dtype=torch.int8)})),
                 "must be a tensor of fp32, fp16 or bf16, got torch.int8"),
    "a NaN": (lambda f: tensors(f, lambda w: w["model.shared.weight"].fill_(float("nan"))), "must compute the same"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "must hold model.safetensors or pytorch_model.bin"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x08"), "cannot be read"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "must be a folder with config.json and weights"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_said_is_refused_in_one_line(what, folder, tmp_path):
    damage, message = REFUSALS[what]
    damage(folder)
    refused(str(folder), tmp_path / "b", message)


@pytest.mark.parametrize("name", ["../hf/secret.safetensors", "/etc/passwd", "..", "a\x00.safetensors", "x.bin", 3])
def test_an_index_that_leads_elsewhere_is_refused(name, folder, tmp_path):
    as_shards(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**json.loads(index.read_text())["weight_map"], "x": name}}))
    refused(str(folder), tmp_path / "b", "must name files beside it that end in .safetensors")


class Hostile:
    def __init__(self, call, argument):
        self.pair = call, (argument,)

    def __reduce__(self):
        return self.pair


@pytest.mark.parametrize("where", ["pytorch_model.bin", "model.pt", "pytorch_model-1.bin"])
@pytest.mark.parametrize("call", [os.system, eval, exec, argparse.FileType], ids=lambda call: call.__name__)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_hostile_pickle_is_refused_and_executes_nothing(where, call, zipped, folder, tmp_path):
    victim = tmp_path / "executed"
    code = {os.system: f"touch {victim}", argparse.FileType: "w"}.get(call, f"open({str(victim)!r}, 'w')")
    (folder / "model.safetensors").unlink()
    payload = {"args": argparse.Namespace(a=Hostile(call, code)), "model": {"x": Hostile(call, code)}}
    torch.save(payload, folder / where, _use_new_zipfile_serialization=zipped)
    if where == "pytorch_model-1.bin":
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": where}}))
    if where == "model.pt":
        (folder / "config.json").unlink()
    refused(str(folder), tmp_path / "b", "cannot be read as plain data")
    assert not victim.exists()


def test_a_hub_that_is_out_of_reach_names_the_local_way(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(
        "no-one/bart-absent", tmp_path / "b", "give a folder with config.json, model.safetensors and tokenizer.json"
    )
    refused("nowhere", tmp_path / "b", "there is no such path")


def test_what_is_downloaded_holds_no_pickle_and_no_code(tmp_path, monkeypatch, folder):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    import_bart("facebook/bart-base", tmp_path / "b")
    assert asked["name"] == "facebook/bart-base"
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["allow_patterns"])
    assert load_bundle(tmp_path / "b").provenance["imported_from"] == "facebook/bart-base"


# ---------------------------------------------------------------------------------------------------------- commands


def test_commands_print_the_proof_and_exit_codes(folder, tmp_path, capsys):
    bundle, out = str(tmp_path / "b"), str(tmp_path / "out")
    assert main(["import-bart", str(folder), "--out", bundle]) == 0
    assert "modes causal, logits differ from transformers' by" in capsys.readouterr().err
    assert main(["export-bart", bundle, "--out", out]) == 0
    assert "transformers' logits differ from the content stream's by" in capsys.readouterr().err
    assert main(["export-bart", bundle, "--out", out]) == 5
    assert main(["import-bart", bundle, "--out", str(tmp_path / "c")]) == 5
    assert "is a bundle already" in capsys.readouterr().err
    assert main(["import-bart", str(folder), "--out", out]) == 5, "an export is not overwritten"
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").unlink()
    assert main(["import-bart", str(folder), "--out", str(tmp_path / "c")]) == 4
    assert main(["import-bart", str(folder), "--out", str(tmp_path / "c"), "--tokenizer", bundle]) == 0
    assert load_bundle(tmp_path / "c").tokenizer.sha256 == TOKENIZER.sha256


def janus_bundle(folder, imported, **shape):
    """A bundle of other modes or shape than BART's."""
    description = load_bundle(imported).description
    model = description.model.model_copy(update=shape)
    changed = Description(model, description.ids, description.layout, ("ar", "nar"), {"name": "janus"})
    torch.manual_seed(1)
    return write_bundle(folder, EncoderDecoder(model, description.ids).state_dict(), changed, TOKENIZER, {})


def test_exporting_janus_says_what_is_lost(folder, tmp_path, capsys):
    import_bart(str(folder), tmp_path / "b")
    export_bart(janus_bundle(tmp_path / "j", tmp_path / "b"), tmp_path / "out")
    assert "not in" in (said := capsys.readouterr().err) and "modes ar, nar" in said


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"norm": "pre"}, "`norm` must be 'post' to be a BART, is 'pre'"),
        ({"positions": "sinusoidal"}, "`positions` must be 'learned'"),
        ({"embed_norm": False}, "`embed_norm` must be True"),
    ],
)
def test_a_model_that_is_no_bart_is_not_exported(shape, message, folder, tmp_path):
    import_bart(str(folder), tmp_path / "b")
    with pytest.raises(CheckpointError, match=message):
        export_bart(janus_bundle(tmp_path / "j", tmp_path / "b", **shape), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_whose_logits_are_others_is_not_exported(folder, tmp_path, monkeypatch):
    import_bart(str(folder), tmp_path / "b")
    right = bart._their_weights
    monkeypatch.setattr("pretrain.bundles.bart._their_weights", lambda w: {k: v * 1.01 for k, v in right(w).items()})
    with pytest.raises(CheckpointError, match="must compute the same logits"):
        export_bart(tmp_path / "b", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "hf"]

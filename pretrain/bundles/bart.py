"""BART in and out: `import-bart` makes a bundle of a published model, `export-bart` a Hugging Face folder of a bundle.

Names of parameters are the same on both sides (`models/layers.py`). BART has no length predictor, so an imported one
gives every length the same score; it has no query stream either, so what an export computes are the logits of the
content stream. Both commands end with a proof: transformers computes the same logits, or nothing is kept.

This is the one file that imports transformers, and it does so when a command runs.

Shapes: T tokens, V vocabulary, D width, N length classes.
"""

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.bundles.bundle import (
    CONFIG,
    GENERATION,
    GOLDEN_TOLERANCE,
    TIED,
    WEIGHTS,
    build_model,
    check_replaceable,
    load_bundle,
    write_bundle,
    write_json,
)
from pretrain.bundles.description import BART_NAMES, Description, Mode, bart_fields, generation_config, to_bart
from pretrain.bundles.foreign import read_foreign
from pretrain.bundles.whole_folder import whole_folder
from pretrain.config import ModelConfig, validate
from pretrain.data.bart_tokenizer import GPT2, HUGGING_FACE, hugging_face_files
from pretrain.data.files import sha256_of
from pretrain.data.tokenizer import HUB_ID, TOKENIZER_FILE, TextTokenizer
from pretrain.errors import CheckpointError, ConfigError
from pretrain.models import EncoderDecoder
from pretrain.models.golden import golden
from pretrain.models.patterns import ArLayout, Layout
from pretrain.runs import version

BIAS, LENGTHS = "head.bias_V", "length_head.weight"
EXITS = ("feedback.", "ramps.")  # what BART has no place for
# All names of the one token table; files hold some of them.
TABLE = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
# BartConfig field -> the only value that the model here, and transformers' BART, can have.
FIXED: dict[str, Any] = {
    "model_type": "bart",
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "normalize_before": False,
    "normalize_embedding": True,
    "add_final_layer_norm": False,
    "static_position_embeddings": False,
    "extra_pos_embeddings": 2,
    "quantization_config": None,
}
IDS = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
DOWNLOADED = (CONFIG, "model*.safetensors", "model.safetensors.index.json", TOKENIZER_FILE, *HUGGING_FACE)


def import_bart(path_or_id: str, out: str | Path, tokenizer: str | None = None) -> Path:
    """Writes the bundle of a BART model whose logits are those of transformers.

    Args:
        path_or_id: a Hugging Face folder, a fairseq folder or file, or the id of a Hugging Face repository.
        tokenizer: where the tokenizer is, if not in the same folder; what `TextTokenizer.from_path_or_hub` takes.

    Raises:
        CheckpointError: no BART, one that the model here cannot express, a broken or hostile file, or other logits.
        DataError: no tokenizer, or one that is broken.
    """
    check_replaceable(Path(out))
    place = _local(path_or_id)
    foreign = read_foreign(place)
    provenance = {
        "imported_from": path_or_id,
        "files": {file.name: sha256_of(file) for file in foreign.files},
        "packages": {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
    }
    check_replaceable(Path(out), provenance)
    home = place if place.is_dir() else place.parent
    text_tokenizer = TextTokenizer.from_path_or_hub(tokenizer or str(home))
    theirs = _their_config(foreign.config, where=str(place))
    weights = _our_weights(foreign.weights, where=str(place))
    description = _describe(theirs.to_dict(), text_tokenizer, weights, where=str(place))
    width = weights["shared.weight"].shape[-1]
    weights.setdefault(LENGTHS, torch.zeros(description.model.length_classes, width))
    model = build_model(description, weights, where=str(place))
    difference = _difference(_their_model(theirs, weights), model, description.layout)
    write_bundle(out, weights, description, text_tokenizer, provenance)
    modes = ", ".join(description.modes) or "none yet: tune it before it writes"
    _say(f"bundle {out}: {_size(model)}, modes {modes}, logits differ from transformers' by {difference:.1e}")
    return Path(out)


def export_bart(bundle_path: str | Path, out: str | Path) -> Path:
    """Writes the folder that `BartForConditionalGeneration.from_pretrained` reads, and reads it that way.

    Raises:
        CheckpointError: a bad bundle, a model that BART cannot express, `out` exists, or transformers' logits differ.
    """
    _check_new(Path(out))
    bundle = load_bundle(bundle_path)
    description = bundle.description
    for name, right in (("norm", "post"), ("positions", "learned"), ("embed_norm", True)):
        found = getattr(description.model, name)
        if found != right:
            raise CheckpointError(f"`{bundle_path}`: `{name}` must be {right!r} to be a BART, is {found!r}")
    config = {name: value for name, value in to_bart(description).items() if name != "parlance"}
    files = hugging_face_files(bundle.tokenizer.json_text, description.model.max_positions)
    with whole_folder(Path(out), partial(_check_new, Path(out))) as folder:
        write_json(folder / CONFIG, {**config, "dtype": "float32"})
        write_json(folder / GENERATION, generation_config(description))
        tensors = _their_weights(bundle.model.state_dict())
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        theirs = _transformers().BartForConditionalGeneration.from_pretrained(folder)
        difference = _difference(theirs, bundle.model, description.layout)
    _say(f"{out}: {_size(bundle.model)}, transformers' logits differ from the content stream's by {difference:.1e}")
    if set(description.modes) - {"causal"}:
        lost = ", ".join(mode for mode in description.modes if mode != "causal")
        _say(f"not in {out}: the length predictor, and modes {lost}, which BART's own code cannot write in")
    return Path(out)


# ------------------------------------------------------------------------------------------------------- steps of both


def _check_new(out: Path) -> None:
    if out.exists():
        raise CheckpointError(f"`{out}` exists: it is not overwritten, name another folder")


def _local(path_or_id: str) -> Path:
    """The path itself, or the folder into which a repository's configuration, safetensors and tokenizer were loaded."""
    if Path(path_or_id).exists():
        return Path(path_or_id)
    local = f"a folder with {CONFIG}, {WEIGHTS} and {TOKENIZER_FILE}, or one with model.pt, {', '.join(GPT2)}"
    if not HUB_ID.fullmatch(path_or_id):
        raise CheckpointError(f"`{path_or_id}` must be {local}: there is no such path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # network, missing repository, offline mode: each has a type of its own
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"`{path_or_id}` cannot be downloaded ({reason}); give {local}") from None


def _their_config(values: Mapping[str, Any], where: str) -> Any:
    """transformers' BartConfig, which knows the defaults of fields that a file leaves out."""
    if "parlance" in values:
        raise CheckpointError(f"`{where}` is a bundle already")
    for name, right in FIXED.items():
        found = values.get(name, None if name == "model_type" else right)
        if found != right:
            raise CheckpointError(f"`{where}`: `{name}` must be {right!r}, is {found!r}")
    known = {name for names in BART_NAMES.values() for name in names} | {*IDS}
    try:
        return _transformers().BartConfig(**{name: value for name, value in values.items() if name in known})
    except Exception as error:  # transformers' own validation
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"`{where}` does not describe a BART: {reason}") from None


def _describe(
    theirs: Mapping[str, Any], tokenizer: TextTokenizer, weights: Mapping[str, Tensor], where: str
) -> Description:
    """The model in our words. An imported BART writes left to right on its content stream, `causal`."""
    rest: dict[str, bool | int] = {"logits_bias": BIAS in weights}
    if LENGTHS in weights:
        rest["length_classes"] = weights[LENGTHS].shape[0]
    try:
        model = validate(ModelConfig, {**bart_fields(theirs, where), **rest}, where=where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    ids = tokenizer.ids
    for name, ours in (("bos_token_id", ids.bos), ("pad_token_id", ids.pad), ("eos_token_id", ids.eos)):
        if theirs[name] != ours:
            raise CheckpointError(f"`{where}`: `{name}` must be the tokenizer's {ours}, is {theirs[name]}")
    layouts: dict[int, Layout] = {ids.eos: "eos_first", ids.bos: "bos_first"}
    start = theirs["decoder_start_token_id"]
    if start not in layouts:
        raise CheckpointError(f"`{where}`: `decoder_start_token_id` must be {ids.eos} or {ids.bos}, is {start}")
    if tokenizer.vocab_size > (model.vocab_size or 0):
        raise CheckpointError(
            f"`{where}`: `vocab_size` must be at least the tokenizer's {tokenizer.vocab_size}, is {model.vocab_size}"
        )
    # Only JANUS has a length predictor, and its released code writes MASK in the decoder as <unk>: no mode is claimed.
    modes: tuple[Mode, ...] = () if LENGTHS in weights else ("causal",)
    layout = ArLayout.aligned(layouts[start], ids)
    return Description(model, ids, layout, modes, {"name": "denoise", "ar_layout": layouts[start]})


def _our_weights(given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights by the names of EncoderDecoder: the token table once, a bias of the logits only if it is not zero."""
    weights = {name: value for name, value in given.items() if name not in (*TABLE, "final_logits_bias")}
    tables = {name: given[name] for name in TABLE if name in given}
    if not tables or any(table.dim() != 2 for table in tables.values()):
        raise CheckpointError(f"`{where}` is no BART: it lacks `shared.weight`, a matrix")
    first, *others = tables
    for name in others:
        if not torch.equal(tables[name], tables[first]):
            raise CheckpointError(f"`{where}`: `{name}` and `{first}` must be one table of embeddings, they differ")
    weights["shared.weight"] = tables[first]
    bias = given.get("final_logits_bias")
    if bias is not None and bool(bias.count_nonzero()):
        weights[BIAS] = bias.flatten()
    return weights


def _their_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dictionary of BartForConditionalGeneration, tied weights once, as transformers saves it."""
    ours = (BIAS, LENGTHS, TIED, *(name for name in weights if name.startswith(EXITS)))
    kept = {f"model.{name}": value for name, value in weights.items() if name not in ours}
    bias_V = weights.get(BIAS)
    kept["final_logits_bias"] = (torch.zeros(len(weights["shared.weight"])) if bias_V is None else bias_V)[None]
    return {name: value.float().contiguous() for name, value in kept.items()}


def _their_model(config: Any, weights: Mapping[str, Tensor]) -> Any:
    """transformers' model of an imported configuration with these weights."""
    model = _transformers().BartForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(_their_weights(weights), strict=False)
    strange = [*unexpected, *(name for name in missing if name.removeprefix("model.") not in TABLE)]
    if strange:
        raise CheckpointError(f"transformers' BART does not agree that it has `{strange[0]}`")
    return model


@torch.no_grad()
def _difference(theirs: Any, model: EncoderDecoder, layout: ArLayout) -> float:
    """Largest difference of the content stream's logits [T, V] on the golden input; raises if it is no rounding."""
    ours = golden(model, layout, ("causal",))
    decoder_input = torch.from_numpy(layout.content(ours["in/target"].numpy()))
    logits = theirs.eval()(input_ids=ours["in/source"][None], decoder_input_ids=decoder_input[None]).logits[0]
    right = ours["logits/causal"]
    difference, largest = float((logits - right).abs().max()), float(right.abs().max())
    if not difference <= GOLDEN_TOLERANCE * max(1.0, largest):
        raise CheckpointError(f"transformers must compute the same logits, they differ by {difference:.3g}")
    return difference


def _transformers() -> Any:
    """The package, quiet: its progress bars and advice are not ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _size(model: EncoderDecoder) -> str:
    return f"{sum(value.numel() for value in model.parameters()):,} parameters"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""BART weights that other programs wrote, read as data: nothing in a file is executed.

    config.json + model.safetensors, whole or in shards with an index    Hugging Face
    config.json + pytorch_model.bin, whole or in shards with an index    Hugging Face, a pickle
    model.pt or any other *.pt                                           fairseq, a pickle with an argparse.Namespace

Pickles are decoded by torch's restricted reader, which knows tensors and plain containers; `argparse.Namespace`, in
which fairseq keeps its options, is the only class allowed besides.

Shapes: V vocabulary, D width, P positions.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.models.layers import POSITION_OFFSET
from pretrain.plain import check_plain, read_plain

CONFIG, FAIRSEQ = "config.json", "model.pt"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What fairseq writes beside weights: format numbers and a tensor that only remembers a device.
NO_WEIGHTS = re.compile(r"(encoder|decoder)\.(version|embed_positions\._float_tensor)")
RENAMED = {"decoder.output_projection.weight": "lm_head.weight", "decoder.embed_length.weight": "length_head.weight"}
# fairseq option -> the only value that BART has.
FIXED_OPTIONS = {
    "encoder_normalize_before": False,
    "decoder_normalize_before": False,
    "encoder_learned_pos": True,
    "decoder_learned_pos": True,
    "layernorm_embedding": True,
}


@dataclass(frozen=True)
class Foreign:
    """config: in the field names of Hugging Face's BartConfig. weights: names without `model.`. files: where from."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    files: tuple[Path, ...]


def read_foreign(path: str | Path) -> Foreign:
    """Reads a folder, or a fairseq checkpoint by its file name.

    Raises:
        CheckpointError: nothing to read, or a file that is broken, hostile or of another kind.
    """
    place = Path(path)
    if place.is_file():
        return _read_fairseq(place)
    if (place / CONFIG).is_file():
        config = _read_object(place / CONFIG)
        read, files = _weight_files(place)
        weights: dict[str, Tensor] = {}
        for file in files:
            for name, value in read(file).items():
                plain = name.removeprefix("model.")
                if plain in weights:
                    raise CheckpointError(f"`{file}`: `{plain}` must be given once")
                weights[plain] = _checked(value, name, file)
        return Foreign(config, weights, files)
    if (place / FAIRSEQ).is_file():
        return _read_fairseq(place / FAIRSEQ)
    raise CheckpointError(f"`{path}` must be a folder with {CONFIG} and weights, or with fairseq's {FAIRSEQ}")


def _weight_files(folder: Path) -> tuple[Callable[[Path], Mapping[str, Any]], tuple[Path, ...]]:
    """How to read the weights of a Hugging Face folder, and the files; safetensors go before pickles."""
    for read, name in ((_read_safetensors, "model.safetensors"), (_read_pickle, "pytorch_model.bin")):
        if (folder / name).is_file():
            return read, (folder / name,)
        index = folder / f"{name}.index.json"
        if index.is_file():
            named = _read_object(index).get("weight_map")
            shards = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
            # A name with a folder in it could lead anywhere.
            strange = [shard for shard in shards if not re.fullmatch(r"[\w-][\w.-]*" + Path(name).suffix, shard)]
            if strange or not shards:
                found = repr(strange[0][:80]) if strange else "none"
                raise CheckpointError(
                    f"`{index}` must name files beside it that end in {Path(name).suffix}, got {found}"
                )
            return read, tuple(folder / shard for shard in shards)
    raise CheckpointError(f"`{folder}` must hold model.safetensors or pytorch_model.bin, whole or with an index")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        check_plain(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"`{path}` cannot be read: {' '.join(str(error).split())}") from None


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        check_plain(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file may fail anywhere in the reader, with any exception
        reason = " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())[:300]
        raise CheckpointError(f"`{path}` cannot be read as plain data: {type(error).__name__}: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"`{path}` must hold a dictionary of names, got {type(content).__name__}")
    return content


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path}` cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"`{path}` must hold an object, got {type(values).__name__}")
    return values


def _checked(value: Any, name: str, file: Path) -> Tensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in DTYPES:
        found = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(f"`{file}`: `{name}` must be a tensor of fp32, fp16 or bf16, got {found}")
    return value.detach()


# ---------------------------------------------------------------------------------------------------------- fairseq


def _read_fairseq(path: Path) -> Foreign:
    content = _read_pickle(path)
    options, given = _options(content, path), content.get("model")
    if not isinstance(given, dict):
        raise CheckpointError(f"`{path}` must be a fairseq checkpoint with `model`, it has {', '.join(content)[:100]}")
    weights = {
        RENAMED.get(name, name): _checked(value, name, path)
        for name, value in ((str(name), value) for name, value in given.items())
        if not NO_WEIGHTS.fullmatch(name)
    }
    try:
        config = _config(options, weights, path)
    except KeyError as error:
        raise CheckpointError(f"`{path}` is no BART of fairseq: it lacks {error}") from None
    return Foreign(config, weights, (path,))


def _options(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The model's options: `args` of old checkpoints, `cfg.model` of newer ones."""
    found, newer = content.get("args"), content.get("cfg")
    if found is None and isinstance(newer, dict):
        found = newer.get("model")
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    if not isinstance(found, dict):
        raise CheckpointError(f"`{path}` must be a fairseq checkpoint with `args` or `cfg`, it has neither")
    return found


def _config(options: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """BartConfig's fields: sizes from the tensors, the rest from the options; raises KeyError for what is missing."""
    for name, right in FIXED_OPTIONS.items():
        if options[name] != right:
            raise CheckpointError(f"`{path}`: option `{name}` must be {right}, is {options[name]!r}")
    tokens_VD, positions_PD = weights["encoder.embed_tokens.weight"], weights["encoder.embed_positions.weight"]
    if tokens_VD.dim() != 2 or positions_PD.dim() != 2:
        raise CheckpointError(f"`{path}`: the embeddings of tokens and positions must be matrices")
    config = {
        "model_type": "bart",
        "vocab_size": tokens_VD.shape[0],
        "d_model": tokens_VD.shape[1],
        "max_position_embeddings": positions_PD.shape[0] - POSITION_OFFSET,
        "activation_function": options["activation_fn"],
        "scale_embedding": not options["no_scale_embedding"],
        "dropout": options["dropout"],
        "attention_dropout": options["attention_dropout"],
        "activation_dropout": options["relu_dropout" if "relu_dropout" in options else "activation_dropout"],
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }
    for half in ("encoder", "decoder"):
        config[f"{half}_layers"] = len({name.split(".")[2] for name in weights if name.startswith(f"{half}.layers.")})
        config[f"{half}_attention_heads"] = options[f"{half}_attention_heads"]
        config[f"{half}_ffn_dim"] = options[f"{half}_ffn_embed_dim"]
        config[f"{half}_layerdrop"] = options.get(f"{half}_layerdrop") or 0.0
    return config

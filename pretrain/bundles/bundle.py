"""The hand-off bundle: a folder with everything that fine-tuning needs and a proof that it was read right.

    model.safetensors       fp32 weights by parameter name of Hugging Face's BartModel, tied ones once
    config.json             BART's field names; what BART has no name for is in its `parlance` section
    tokenizer.json  generation_config.json
    provenance.json         run, step, configuration, versions, sources and licences
    golden.safetensors      a fixed input and its logits per mode
    manifest.json           size and sha256 of all of these (pretrain/checkpoints/seal.py)
    README.md               the model card, which people may edit (pretrain/bundles/card.py)

A bundle appears whole or not at all; loading one checks every bit and computes the golden logits again.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.bundles.card import CARD, model_card
from pretrain.bundles.description import Description, from_bart, generation_config, to_bart
from pretrain.bundles.origin import origin, other_origin
from pretrain.bundles.whole_folder import whole_folder
from pretrain.checkpoints import seal
from pretrain.data.files import sha256_of
from pretrain.data.tokenizer import TOKENIZER_FILE, TextTokenizer
from pretrain.errors import CheckpointError, DataError, UsageError
from pretrain.models import EncoderDecoder
from pretrain.models.golden import golden
from pretrain.plain import check_plain, read_plain

CONFIG, WEIGHTS, GOLDEN = "config.json", "model.safetensors", "golden.safetensors"
GENERATION, PROVENANCE = "generation_config.json", "provenance.json"
TIED = "head.weight"  # the same tensor as shared.weight
# Another CPU or thread count sums in another order; a wrong weight is off by whole units.
GOLDEN_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Bundle:
    """What `load_bundle` returns. golden_error: largest difference of the recomputed logits, None if not verified."""

    model: EncoderDecoder
    description: Description
    tokenizer: TextTokenizer
    provenance: dict[str, Any]
    golden_error: float | None


def write_bundle(
    out: str | Path,
    weights: Mapping[str, Tensor],
    description: Description,
    tokenizer: TextTokenizer,
    provenance: Mapping[str, Any],
) -> Path:
    """Writes a bundle beside `out` and renames it into place; an older bundle of the same origin there is replaced.

    Args:
        weights: {name in EncoderDecoder: tensor}; with or without the tied `head.weight`.

    Raises:
        CheckpointError: `out` holds something else, or `weights` do not fit the description.
    """
    target = Path(out)
    check_replaceable(target, provenance)
    stored = {name: value.float().contiguous() for name, value in weights.items() if name != TIED}
    model = build_model(description, stored, where="weights")
    with whole_folder(target, partial(check_replaceable, target, provenance)) as staging:
        save_file(stored, staging / WEIGHTS, metadata={"format": "pt"})
        save_file(golden(model, description.layout, description.modes), staging / GOLDEN)
        write_json(staging / CONFIG, to_bart(description))
        write_json(staging / GENERATION, generation_config(description))
        write_json(staging / PROVENANCE, provenance)
        tokenizer.save(staging)
        seal.seal_folder(staging, step=0)
        (staging / CARD).write_text(model_card(model, description, provenance), encoding="utf-8")
    return target


def check_replaceable(target: Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Raises CheckpointError where something other than a bundle of the same run, or source, lies at `target`.

    provenance: of the bundle that is to stand there; None where it is not known yet, and any bundle will do.
    """
    if not target.exists():
        return
    if not is_bundle(target):
        raise CheckpointError(f"`{target}` exists and is no bundle: it is not overwritten, name another folder")
    if provenance is None:
        return
    try:
        standing = _read_json(target / PROVENANCE)
    except CheckpointError:
        standing = {}
    difference = other_origin(standing, provenance)
    if difference is not None:
        raise CheckpointError(
            f"`{target}` must be new or a bundle of {origin(provenance)}, it is one of {origin(standing)}{difference}: "
            "name another folder, or delete it"
        )


def load_bundle(path: str | Path, verify: bool = True, backend: str = "auto") -> Bundle:
    """Reads a bundle on the CPU, in eval mode.

    Args:
        verify: hash every file, compute the golden logits again and refuse a difference above 1e-4 of their largest
            value.

    Raises:
        CheckpointError: a file is missing or broken, the architecture is another, or the logits differ.
    """
    folder = Path(path)
    if verify:
        check_seal(folder)
    description, tokenizer = read_description(folder)
    if tokenizer.vocab_size > (description.model.vocab_size or 0):
        raise CheckpointError(
            f"`{folder}`: `vocab_size` must be at least the tokenizer's {tokenizer.vocab_size}, "
            f"got {description.model.vocab_size}"
        )
    model = build_model(description, _read_tensors(folder / WEIGHTS), where=str(folder / WEIGHTS), backend=backend)
    golden_error = _golden_error(model, description, folder / GOLDEN) if verify else None
    return Bundle(model, description, tokenizer, _read_json(folder / PROVENANCE), golden_error)


def check_seal(folder: Path) -> None:
    """Raises CheckpointError naming the first file that is not as it was written; a bundle without manifest is not."""
    check_is_bundle(folder)
    for problem in problems(folder):
        raise CheckpointError(f"bundle `{folder}` is not as it was written: {problem}")


def problems(folder: Path) -> list[str]:
    """What is not as it was written, one line each; the card may be anything."""
    return seal.verify(folder, step_in_name=False, unsealed=(CARD,))


def check_is_bundle(folder: Path) -> None:
    """Raises CheckpointError saying what `folder` is instead, and where the bundle may be."""
    if (folder / CONFIG).exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"bundle `{folder}`: there is no such folder")
    if (folder / "bundle" / CONFIG).exists():
        raise CheckpointError(f"`{folder}` is a run: its bundle is `{folder / 'bundle'}`")
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(f"`{folder}` is a run: `python -m pretrain handoff {folder} --out BUNDLE` makes a bundle")
    raise CheckpointError(f"bundle `{folder}` lacks {CONFIG}")


def read_description(path: str | Path) -> tuple[Description, TextTokenizer]:
    """What a bundle says about its model, and its tokenizer; weights are not read.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    folder = Path(path)
    check_is_bundle(folder)
    description = from_bart(_read_json(folder / CONFIG), where=str(folder / CONFIG))
    try:
        return description, TextTokenizer.from_path(folder)
    except DataError as error:
        raise CheckpointError(str(error)) from None


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Where a bundle says it comes from; raises CheckpointError where that is missing or broken."""
    return _read_json(Path(path) / PROVENANCE)


def content_sha256(path: str | Path) -> str:
    """What tells one bundle from another without reading its weights: configuration, tokenizer and golden logits."""
    hashes = (sha256_of(Path(path) / name) for name in (CONFIG, TOKENIZER_FILE, GOLDEN))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def is_bundle(folder: Path) -> bool:
    """True for a folder whose config.json has our section."""
    try:
        return "parlance" in _read_json(folder / CONFIG)
    except CheckpointError:
        return False


def check_outside(path: Path, option: str) -> None:
    """Raises UsageError where `path`, which `option` names, is in a bundle: its seal is broken by any file more."""
    within = next((one for one in (path.resolve(), *path.resolve().parents) if is_bundle(one)), None)
    if within is not None:
        raise UsageError(
            f"`{option}` must not be in a bundle, which nothing may be added to: `{path}` is in `{within}`"
        )


def build_model(
    description: Description, weights: Mapping[str, Tensor], where: str, backend: str = "auto"
) -> EncoderDecoder:
    """The described model with exactly these weights, in eval mode; raises CheckpointError naming the first misfit."""
    try:
        with torch.device("meta"):  # a size that is wrong must end in an error, not in an allocation
            shapes = EncoderDecoder(description.model, description.ids, backend=backend).state_dict()
    except (RuntimeError, OverflowError) as error:
        raise CheckpointError(f"`{where}`: no model can be so large: {str(error).splitlines()[0]}") from None
    wanted = {name: tuple(value.shape) for name, value in shapes.items() if name != TIED}
    for name, shape in wanted.items():
        if name not in weights:
            raise CheckpointError(f"`{where}` is of another architecture: it lacks `{name}`")
        if tuple(weights[name].shape) != shape:
            found = tuple(weights[name].shape)
            raise CheckpointError(f"`{where}` is of another architecture: `{name}` must be {shape}, is {found}")
    for name in weights:
        if name not in wanted:
            raise CheckpointError(f"`{where}` is of another architecture: the model has no `{name}`")
    model = EncoderDecoder(description.model, description.ids, backend=backend)
    model.load_state_dict({**weights, TIED: weights["shared.weight"]})
    return model.eval()


def _golden_error(model: EncoderDecoder, description: Description, path: Path) -> float:
    expected = _read_tensors(path)
    found = golden(model, description.layout, description.modes)
    if expected.keys() != found.keys():
        raise CheckpointError(f"`{path}` must hold {', '.join(sorted(found))}, holds {', '.join(sorted(expected))}")
    worst = 0.0
    for name, logits in found.items():
        right = expected[name]
        if right.shape != logits.shape:
            raise CheckpointError(f"`{path}`: `{name}` must be of shape {tuple(logits.shape)}, is {tuple(right.shape)}")
        difference = float((logits.double() - right.double()).abs().max())
        limit = GOLDEN_TOLERANCE * max(1.0, float(right.double().abs().max())) if name.startswith("logits/") else 0.0
        if not difference <= limit:
            raise CheckpointError(
                f"`{path.parent}` does not compute what it was written with: `{name}` differs by "
                f"{difference:.3g}, at most {limit:.3g} is allowed"
            )
        worst = max(worst, difference)
    return worst


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_plain(path, seal.MAX_JSON_BYTES))
    except FileNotFoundError:
        raise CheckpointError(f"bundle `{path.parent}` lacks {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path}` cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"`{path}` must hold an object, got {type(values).__name__}")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        check_plain(path)
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"bundle `{path.parent}` lacks {path.name}") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"`{path}` cannot be read: {' '.join(str(error).split())}") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """`values` as readable JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

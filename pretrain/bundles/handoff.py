"""`handoff RUN --out BUNDLE`: the last verified checkpoint of a run as a bundle for fine-tuning."""

import sys
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain import objectives
from pretrain.bundles.bundle import check_replaceable, load_bundle, write_bundle
from pretrain.bundles.card import advice
from pretrain.bundles.description import Description, Mode
from pretrain.checkpoints.checkpoint import read_progress
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.seal import read_json
from pretrain.config import RunConfig
from pretrain.data.manifest import Manifest, read_manifest, read_tokenizer
from pretrain.errors import CheckpointError
from pretrain.loop import Progress
from pretrain.runs import CONFIG, ENVIRONMENT, check_data, edited, fingerprint, read_config


def handoff(run_dir: str | Path, out: str | Path) -> Path:
    """Writes the bundle, loads it again as fine-tuning will, and says how far the logits differ.

    Raises:
        CheckpointError: `run_dir` is no run, has no intact checkpoint, or `out` may not be overwritten.
        DataError: the data folder of the run is gone or holds other data than the checkpoint was trained on.
    """
    run = Path(run_dir)
    config = read_config(run, RunConfig)
    if config is None:
        raise CheckpointError(f"`{run_dir}` must be the folder of a run, it has no {CONFIG}")
    commit = Store(run).latest()
    if commit is None:
        raise CheckpointError(f"run `{run_dir}` has no checkpoint yet: train at least `train.save_every` steps")
    data = Path(config.data.path)
    manifest = read_manifest(data)
    saved = read_progress(commit)["progress"]
    for key, (was, now) in edited(config.model_dump(mode="json"), saved.get("fixed")).items():
        raise CheckpointError(f"`{run / CONFIG}`: `{key}` must be {was!r}, as {commit.name} was trained, is {now!r}")
    check_data(saved.get("data"), fingerprint(manifest), "data.path", run)
    progress = Progress.from_json(saved)
    provenance = describe(config, progress, manifest, read_environment(run))
    check_replaceable(Path(out), provenance)
    tokenizer = read_tokenizer(data, manifest)
    ids = tokenizer.ids
    objective = objectives.build(config.objective, ids, tokenizer.word_starts, config.model)
    modes = cast(tuple[Mode, ...], tuple(objective.modes))
    description = Description(
        config.model,
        ids,
        objective.layout,
        modes,
        dict(config.objective),
        max_source=min(manifest.plan.max_length, config.model.max_positions),
        length_trained=objective.weights["length"] > 0,
    )
    write_bundle(out, read_weights(commit), description, tokenizer, provenance)
    bundle = load_bundle(out)
    parameters = sum(value.numel() for value in bundle.model.parameters())
    print(
        f"bundle {out}: step {progress.step}, {parameters:,} parameters, modes {', '.join(bundle.description.modes)}"
        f"{advice(description)}, golden logits differ by {bundle.golden_error:.1e}",
        file=sys.stderr,
    )
    return Path(out)


def read_weights(commit: Path) -> dict[str, Tensor]:
    """{name in EncoderDecoder: fp32 tensor} of a checkpoint, whatever engine and number of ranks wrote it."""
    weights: dict[str, Tensor] = {}
    try:
        for path in sorted(commit.glob("state-rank*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    kind, _, name = key.partition("/")
                    if kind in ("param", "buffer"):
                        weights[name.removeprefix("model.")] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"`{commit}` cannot be read: {' '.join(str(error).split())}") from None
    return weights


def read_environment(run: Path) -> dict[str, Any]:
    """env.json of the run, without the names of its nodes; empty where it is missing or broken: no more than a pity."""
    try:
        return {key: value for key, value in read_json(run / ENVIRONMENT).items() if key != "slurm"}
    except CheckpointError:
        return {}


def describe(config: RunConfig, progress: Progress, manifest: Manifest, environment: dict[str, Any]) -> dict[str, Any]:
    """The content of provenance.json."""
    return {
        "run": config.name,
        **progress.to_json(),
        "config": config.model_dump(mode="json"),
        "environment": environment,
        "data": {
            "index_sha256": manifest.index_sha256,
            "tokenizer_sha256": manifest.tokenizer_sha256,
            "sources": [
                {"name": source.name, "licence": source.licence, "samples": source.samples, "tokens": source.tokens}
                for source in manifest.sources
            ],
        },
    }

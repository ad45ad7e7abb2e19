"""Which checkpoints of a run become its bundle: the end of training, the best, or the mean of several.

Each checkpoint keeps the scores of its own step, so the choice follows from the checkpoints that are there and nothing
else: a run that was killed and continued chooses as one that was not.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.config import Selection, TuneTrainConfig
from finetune.hooks import written_tag
from pretrain.bundles.handoff import read_weights
from pretrain.checkpoints.checkpoint import read_progress
from pretrain.checkpoints.commit import Store
from pretrain.errors import CheckpointError, ConfigError
from pretrain.loop import Progress

LOSS, LOSS_TAG = "loss", "valid/total"


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that was due, and what was measured at its step, by the names of TensorBoard."""

    path: Path
    progress: Progress
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Chosen:
    """What becomes the bundle. weights: {name in EncoderDecoder: tensor}. progress: of the newest checkpoint in it."""

    weights: dict[str, Tensor]
    progress: Progress
    provenance: dict[str, Any]


def check(train: TuneTrainConfig, metrics: Sequence[str], modes: Collection[str], validated: bool) -> None:
    """Raises ConfigError where `train.select` asks for what nobody measures. modes: those that texts are written in."""
    select = train.select
    if select is None:
        return
    if select.metric != LOSS and select.metric not in metrics:
        known = ", ".join((LOSS, *metrics))
        raise ConfigError(f"`train.select.metric` must be one of {known}, got {select.metric!r}")
    if select.mode is not None and select.mode not in modes:
        raise ConfigError(f"`train.select.mode` must be one of {', '.join(modes)}, got {select.mode!r}")
    if not validated:
        raise ConfigError("`train.select` must be null where the task has no validation pairs")


def tag(select: Selection, modes: Sequence[str]) -> str:
    """The name in TensorBoard of what is selected by."""
    return LOSS_TAG if select.metric == LOSS else written_tag(select.mode or modes[0], select.metric)


def candidates(store: Store) -> list[Candidate]:
    """The intact checkpoints that were due, oldest first."""
    return [found for path in store.intact() if (found := _candidate(path))]


def _candidate(path: Path) -> Candidate | None:
    content = read_progress(path)["progress"]
    if not isinstance(content.get("scores"), dict):
        return None
    scores = {name: float(value) for name, value in content["scores"].items() if type(value) in (int, float)}
    return Candidate(path, Progress.from_json(content), scores)


def choose(given: Sequence[Candidate], train: TuneTrainConfig, modes: Sequence[str]) -> list[Candidate]:
    """The best `train.average` candidates, best first and the earlier of equals; without `select` the newest.

    What is left out now is left out whatever comes later, so that it need not be kept.
    """
    if train.select is None:
        return list(reversed(given))[: train.average]
    name, sign = tag(train.select, modes), 1 if train.select.metric == LOSS else -1
    scored = [one for one in given if name in one.scores]
    return sorted(scored, key=lambda one: (sign * one.scores[name], one.progress.step))[: train.average]


def spare(store: Store, train: TuneTrainConfig, modes: Sequence[str]) -> set[str]:
    """Names of the checkpoints that retention must not delete."""
    return {one.path.name for one in choose(candidates(store), train, modes)}


def end_of_training(store: Store, weights: dict[str, Tensor], progress: Progress) -> Chosen:
    """`weights`, which training ended with, and what the checkpoint of that step keeps of its scores."""
    kept = [_candidate(path) for path in store.commits()[-1:]]
    return Chosen(weights, progress, _measured([one for one in kept if one and one.progress.step == progress.step]))


def _measured(picked: Sequence[Candidate]) -> dict[str, Any]:
    """What provenance.json says of the checkpoints in a bundle. scores: {name in TensorBoard: value} of each."""
    return {"checkpoints": [one.progress.step for one in picked], "scores": [dict(one.scores) for one in picked]}


def chosen_weights(store: Store, train: TuneTrainConfig, modes: Sequence[str]) -> Chosen:
    """The weights of the chosen checkpoints, or their mean.

    Raises:
        CheckpointError: none was measured by what `select` names, or one cannot be read.
    """
    picked = choose(candidates(store), train, modes)
    if not picked:
        wanted = f"`{tag(train.select, modes)}`" if train.select else "the scores of its step"
        raise CheckpointError(
            f"`{store.run_dir}` must have an intact checkpoint that keeps {wanted}, it has none: "
            "they were saved before `train.select` or `train.average` was given"
        )
    provenance = _measured(picked)
    shown = f"checkpoints {provenance['checkpoints']}"
    if train.select is not None:
        name = provenance["selected_by"] = tag(train.select, modes)
        shown += f" selected_by {name} scores {[one.scores[name] for one in picked]}"
    newest = max((one.progress for one in picked), key=lambda progress: progress.step)
    print(f"bundle of {shown}", file=sys.stderr, flush=True)
    return Chosen(average([one.path for one in picked]), newest, provenance)


def average(commits: Sequence[Path]) -> dict[str, Tensor]:
    """{name in EncoderDecoder: mean over the checkpoints}, in float64; of one checkpoint its own tensors.

    One checkpoint is in memory at a time. Checkpoint averaging as in fairseq's `average_checkpoints.py`.
    """
    first, *others = commits
    weights = read_weights(first)
    if not others:
        return weights
    total = {name: value.double() for name, value in weights.items()}
    for commit in others:
        for name, value in read_weights(commit).items():
            total[name] += value
    return {name: value / len(commits) for name, value in total.items()}

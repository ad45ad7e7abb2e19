"""What a tuning run left on disk: its task, its curves, what it cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from finetune import tasks
from finetune.generate import NEEDS
from finetune.hooks import written_tag
from finetune.tasks import Pair
from finetune.tasks.pairs import read_lines
from finetune.train import BUNDLE, TASK
from pretrain import runs
from pretrain.bundles.bundle import check_is_bundle, read_provenance
from pretrain.errors import CheckpointError, ConfigError, DataError
from pretrain.parsing import read_yaml
from pretrain.report.status import kept_saves, whole_events

Curve = list[tuple[int, float]]
LOSS, VALID, TOTAL = "loss/", "valid/", "total"


@dataclass(frozen=True)
class Cost:
    """What training took, as far as its result is kept: updates that a kill threw away are not in it.

    device_seconds: of updates, on all ranks together. save_seconds: of saving, on one rank. saves: (update,
    device-seconds until then), from (0, 0) on. kept, samples, tokens: update of the bundle, and what it has seen.
    """

    device: str
    ranks: int
    updates: int
    kept: int
    samples: int
    tokens: int
    device_seconds: float
    save_seconds: float
    restarts: int
    saves: tuple[tuple[int, float], ...]

    def until(self, step: int) -> float:
        """Device-seconds of the first `step` updates; between two saves each update counts the same."""
        steps, seconds = zip(*self.saves, strict=True)
        return float(np.interp(step, steps, seconds))


@dataclass(frozen=True)
class Record:
    """One run. curves: {name in TensorBoard: [(update, value)]}."""

    name: str
    folder: Path
    task: str
    metrics: tuple[str, ...]
    curves: Mapping[str, Curve]
    cost: Cost
    provenance: Mapping[str, Any]

    @property
    def bundle(self) -> Path:
        return self.folder / BUNDLE

    def pairs(self, split: str, sentences: int) -> list[Pair]:
        """The first pairs of a split, as the run wrote them down; raises DataError where there is none."""
        sides = [self.folder / TASK / f"{split}.{side}" for side in ("source", "target")]
        sources, targets = (read_lines(path) for path in sides)
        if len(sources) != len(targets):
            raise DataError(f"`{sides[1]}` must have as many lines as `{sides[0]}`, {len(sources)}: {len(targets)}")
        if not sources:
            other = "valid" if split == "test" else "test"
            raise DataError(f"`{sides[0]}` must hold at least one line, it is empty: `--split {other}` may have some")
        return [Pair(source, target) for source, target in zip(sources, targets, strict=True)][:sentences]

    def scores(self, metric: str) -> dict[str, Curve]:
        """{mode: its scores of validation texts while it was trained}."""
        tags = {mode: written_tag(mode, metric) for mode in NEEDS}
        return {mode: self.curves[tag] for mode, tag in tags.items() if tag in self.curves}

    def losses(self, group: str) -> dict[str, Curve]:
        """{term: its curve} of `LOSS` or `VALID`; the weighted sum of all only where it has several terms."""
        found = {tag.removeprefix(group): curve for tag, curve in self.curves.items() if tag.startswith(group)}
        return {term: curve for term, curve in found.items() if term != TOTAL or len(found) == 1}


def read_records(folders: Sequence[str]) -> list[Record]:
    """The runs in `folders`, which are compared.

    Raises:
        CheckpointError: a folder is no run, or the run has no bundle yet. ConfigError: its config.yaml is damaged.
        DataError: they were tuned for different tasks.
    """
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for path, real in zip(paths, resolved, strict=True):
        if resolved.count(real) > 1:
            raise DataError(f"each RUN must be another run, `{path}` is given {resolved.count(real)} times")
    names = [real.name for real in resolved]
    shown = [name if names.count(name) == 1 else str(path) for path, name in zip(paths, names, strict=True)]
    records = [_read(path, name) for path, name in zip(paths, shown, strict=True)]
    first = records[0]
    for record in records:
        if record.task != first.task:
            raise DataError(
                f"runs must be tuned for one task to be compared: `{first.folder}` is for {first.task}, "
                f"`{record.folder}` for {record.task}; make a report for each"
            )
    return records


def same_pairs(records: Sequence[Record], split: str, sentences: int) -> list[Pair]:
    """The first pairs of a split; raises DataError naming the first line in which two runs differ."""
    pairs = records[0].pairs(split, sentences)
    for record in records[1:]:
        others = record.pairs(split, sentences)
        differ = next((n for n, (a, b) in enumerate(zip(pairs, others, strict=False), start=1) if a != b), None)
        if differ is None and len(pairs) != len(others):
            differ = min(len(pairs), len(others)) + 1
        if differ is not None:
            raise DataError(
                f"runs must have the same {split} pairs to be compared: line {differ} of "
                f"`{record.folder / TASK / split}.*` is not that of `{records[0].folder / TASK / split}.*`"
            )
    return pairs


def _read(folder: Path, name: str) -> Record:
    events = whole_events(folder)
    config = read_yaml(folder / runs.CONFIG)
    task = config.get("task")
    task_name = task.get("name") if isinstance(task, dict) else None
    if task_name is None:
        raise CheckpointError(
            f"`{folder}` must be a run of `python -m finetune train`, its {runs.CONFIG} names no `task`"
        )
    if task_name not in tasks.REGISTRY:
        known = ", ".join(tasks.REGISTRY)
        raise ConfigError(f"`task.name` of `{folder / runs.CONFIG}` must be one of {known}, got {task_name!r:.80}")
    if not (folder / BUNDLE).is_dir():
        raise CheckpointError(f"run `{folder}` has no bundle yet: `python -m finetune train` writes it at its end")
    check_is_bundle(folder / BUNDLE)
    provenance = read_provenance(folder / BUNDLE)
    metrics = tasks.build({"name": task_name}).metrics
    curves = read_curves(folder / runs.BOARD)
    return Record(name, folder, task_name, metrics, curves, _cost(events, provenance), provenance)


def _cost(events: Sequence[dict[str, Any]], provenance: Mapping[str, Any]) -> Cost:
    begins = [event for event in events if event["event"] in ("start", "resume")]
    environment = begins[-1] if begins else {}
    ranks = environment.get("ranks")
    ranks = ranks if isinstance(ranks, int) and ranks > 0 else 1
    saves = kept_saves(events)
    sums = accumulate(ranks * save["seconds"] for save in saves)
    marks = ((0, 0.0), *((save["step"], total) for save, total in zip(saves, sums, strict=True)))
    step, samples, tokens = (
        value if isinstance(value := provenance.get(key), int) else 0 for key in ("step", "samples", "tokens")
    )
    saving = sum(told for save in saves if isinstance(told := save.get("save_seconds"), int | float))
    device = str(environment.get("device", "unknown"))
    return Cost(
        device=device,
        ranks=ranks,
        updates=marks[-1][0],
        kept=step,
        samples=samples,
        tokens=tokens,
        device_seconds=marks[-1][1],
        save_seconds=saving,
        restarts=sum(event["event"] == "resume" for event in events),
        saves=marks,
    )


def read_curves(folder: Path) -> dict[str, Curve]:
    """Every scalar of a TensorBoard folder; none where there is no event file. A restart hides what it wrote anew."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    files = list(folder.glob("*tfevents*"))
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"`{file}` must be a plain file")
    if not files:
        return {}
    board = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()[SCALARS]}

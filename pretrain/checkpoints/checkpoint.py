"""Saving and resuming a run: engine state, random generators and progress, as one commit.

    state.json, state-rank{r}.safetensors    the engine (engine/state.py)
    rng-rank{r}.safetensors                  the generators of each rank
    progress.json                            {"format", "step", "ranks", "tensor_parallel",
                                              "progress": what the run wants back}

Every function but `read_progress` is collective. Rank 0 alone renames and deletes; an error on any rank is raised on
all of them.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pretrain import distributed, rng
from pretrain.checkpoints.commit import Store, disk_errors
from pretrain.checkpoints.seal import Described, read_json
from pretrain.distributed import World
from pretrain.engine import Engine, state
from pretrain.errors import CheckpointError, ParlanceError

FORMAT = 1
PROGRESS = "progress.json"
Spare = Callable[[Store], Collection[str]]


def open_store(run_dir: str | Path) -> tuple[Store, list[str]]:
    """Takes the run directory for this job and repairs what a killed one left there.

    Returns:
        the store and one line for each thing that was repaired or found damaged.

    Raises:
        CheckpointError: another job is using the directory.
    """
    store = Store(run_dir)

    def begin() -> list[str]:
        store.lock()
        return store.recover()

    lines: list[str] = distributed.rank_zero(begin)
    return store, lines


def save(
    store: Store,
    step: int,
    engine: Engine,
    world: World,
    progress: dict[str, Any],
    keep: int = 0,
    spare: Spare = lambda store: (),
) -> Path:
    """Commits the whole state after `step` updates; then keeps the newest `keep` commits (0: all).

    Args:
        progress: what the loop needs to go on, as JSON.
        spare: names the commits that are kept besides, called on rank 0 when this one is there.

    Raises:
        NonFiniteError: a weight or optimizer state is not finite; nothing is committed.
        DiskError: the disk is full, over quota or read-only; earlier commits are intact.
        CheckpointError: rank 0 does not see a file that another rank wrote.
    """
    staging = Path(distributed.rank_zero(lambda: str(store.begin(step))))
    error: ParlanceError | None = None
    mine: dict[str, Described] = {}
    try:
        with disk_errors(staging):
            names = [*state.save(engine, staging), f"rng-rank{world.rank}.safetensors"]
            rng.save(staging / names[-1])
            if world.rank == 0:
                ranks = {"ranks": world.size, "tensor_parallel": world.tensor_parallel}
                content = {"format": FORMAT, "step": step, **ranks, "progress": progress}
                (staging / PROGRESS).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
                names.append(PROGRESS)
            mine = store.seal(staging, names)
    except ParlanceError as problem:
        error = problem
    try:
        distributed.agree(error)
        files = {name: described for part in distributed.exchange(mine) for name, described in part.items()}
        target = Path(distributed.rank_zero(lambda: str(store.commit(staging, step, files))))
    except ParlanceError:
        distributed.rank_zero(lambda: store.discard(staging))
        raise
    if keep:
        distributed.rank_zero(lambda: store.retain(keep, spare(store)))
    return target


def load_latest(store: Store, engine: Engine, world: World, seed: int) -> dict[str, Any] | None:
    """Resumes from the newest intact commit and returns its progress; None where nothing was ever committed.

    Raises:
        CheckpointError: every commit is damaged, or the newest intact one does not fit the model.
    """

    def find() -> str | None:
        path = store.latest()
        return None if path is None else str(path)

    path = distributed.rank_zero(find)
    return None if path is None else load(Path(path), engine, world, seed)


def load(path: Path, engine: Engine, world: World, seed: int) -> dict[str, Any]:
    """Sets engine and generators to those of the commit at `path` and returns its progress.

    With the number of ranks and the degree of tensor parallelism it was saved with, each rank gets its own generators
    back and goes on bit by bit; with others they are seeded from (seed, step, data-parallel rank).
    """
    state.load(engine, path)
    error: ParlanceError | None = None
    progress: dict[str, Any] = {}
    try:
        content = read_progress(path)
        if (content["ranks"], content.get("tensor_parallel", 1)) == (world.size, world.tensor_parallel):
            rng.restore(path / f"rng-rank{world.rank}.safetensors")
        else:
            rng.seed(seed, content["step"], world.data_rank)
        progress = content["progress"]
    except CheckpointError as problem:
        error = problem
    except state.UNREADABLE as problem:
        reason = " ".join(str(problem).split())
        error = CheckpointError(f"`{path}` cannot be read: {type(problem).__name__}: {reason}")
    distributed.agree(error)
    return progress


def read_progress(path: Path) -> dict[str, Any]:
    """progress.json of the commit at `path`: {"step": int, "ranks": int, "progress": {...}, ...}.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    content = read_json(path / PROGRESS)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"`{path / PROGRESS}`: `format` must be {FORMAT}, is {content.get('format')!r:.80}")
    for key, kind in (("step", int), ("ranks", int), ("progress", dict)):
        if type(content.get(key)) is not kind:
            raise CheckpointError(f"`{path / PROGRESS}`: `{key}` must be {kind.__name__}, is {content.get(key)!r:.80}")
    return content

"""Resuming a run from what `saver` commits: engine state, random generators and progress.

    state.json, state-rank{r}.safetensors    the engine (engine/state.py)
    rng-rank{r}.safetensors                  the generators of each rank
    progress.json                            {"format", "step", "ranks", "tensor_parallel",
                                              "progress": what the run wants back}

Every function but `read_progress` is collective. Rank 0 alone renames and deletes; an error on any rank is raised on
all of them.
"""

from pathlib import Path
from typing import Any

from pretrain import distributed, rng
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.seal import read_json
from pretrain.distributed import World
from pretrain.engine import Engine, state
from pretrain.errors import CheckpointError, ParlanceError

FORMAT = 1
PROGRESS = "progress.json"


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

    lines: list[str] = distributed.rank_zero(begin, long=True)
    return store, lines


def load_latest(store: Store, engine: Engine, world: World, seed: int) -> dict[str, Any] | None:
    """Resumes from the newest intact commit and returns its progress; None where nothing was ever committed.

    Raises:
        CheckpointError: every commit is damaged, or the newest intact one does not fit the model.
    """

    def find() -> str | None:
        path = store.latest()
        return None if path is None else str(path)

    path = distributed.rank_zero(find, long=True)
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

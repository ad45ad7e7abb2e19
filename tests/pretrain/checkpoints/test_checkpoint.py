"""Resume goes on bit by bit; a checkpoint fits every engine, stage and number of ranks; failures commit nothing.

Three jobs do the work (one rank saves, two ranks save and load, one rank loads); the tests look at what they returned.
"""

import errno
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from pretrain import engine as engine_module
from pretrain import rng
from pretrain.checkpoints import checkpoint
from pretrain.checkpoints.commit import Store
from pretrain.distributed import World
from pretrain.engine import state as engine_state
from pretrain.engine.base import deal
from pretrain.errors import CheckpointError, DiskError, NonFiniteError
from tests.distributed_helper import run_ranks
from tests.pretrain.checkpoints.commits import save_state
from tests.pretrain.toy_engine import toy_engine, toy_train

CASES = [("local", 0, "fp32"), *(("deepspeed", stage, "fp32") for stage in range(4))]
CASES += [("local", 0, "bf16"), *(("deepspeed", stage, "bf16") for stage in (1, 2, 3))]
ALONE = World(0, 1, 0, torch.device("cpu"))


def everything(engine: Any) -> dict[str, Any]:
    """The full state of an engine as numpy, and one further update without dropout as proof that it is in use."""
    found: dict[str, Any] = {"updates": engine.updates}
    for name in engine.parameters():
        found |= {f"{key}/{name}": value.numpy() for key, value in engine.read(name).items()}
    found |= {f"buffer/{name}": value.numpy() for name, value in engine.buffers().items()}
    with engine.gathered():
        found |= {f"forward/{name}": p.detach().float().numpy().copy() for name, p in engine.parameters().items()}
    return found


def saved(world: World, run: Path, kind: str, stage: int, precision: str = "fp32", dropout: float = 0.0) -> Any:
    """Trains three updates, commits, and returns the engine and what it then held."""
    engine = toy_engine(world, kind, stage, precision, dropout)
    rng.seed(11, world.rank)
    toy_train(engine, range(3))
    store, _ = checkpoint.open_store(run)
    save_state(store, 3, engine, world, {"position": 33}, keep=1)
    store.unlock()
    return engine


def loaded(world: World, run: Path, kind: str, stage: int, precision: str = "fp32", dropout: float = 0.0) -> Any:
    engine = toy_engine(world, kind, stage, precision, dropout, seed=99)
    store, lines = checkpoint.open_store(run)
    progress = checkpoint.load_latest(store, engine, world, seed=1)
    store.unlock()
    assert lines == [] and progress == {"position": 33}
    return engine


def one_rank_saves(world: World, root: Path) -> Any:
    engine = saved(world, root / "local x 1", "local", 0)
    return everything(engine), toy_train(engine, range(3, 5))


def two_ranks(world: World, root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        run = root / f"resume {case}"
        engine = saved(world, run, *case, dropout=0.3)
        straight = everything(engine), toy_train(engine, range(3, 6)), everything(engine), random.random()
        engine = loaded(world, run, *case, dropout=0.3)
        resumed = everything(engine), toy_train(engine, range(3, 6)), everything(engine), random.random()
        found[f"resume {case}"] = straight, resumed
    engine = saved(world, root / "stage 2 x 2", "deepspeed", 2)
    found["stage 2 x 2"] = everything(engine), toy_train(engine, range(3, 5))
    for source in ("stage 2 x 2", "local x 1"):
        for kind, stage in (("local", 0), ("deepspeed", 3)):
            engine = loaded(world, root / source, kind, stage)
            found[f"{source} -> {kind} {stage} x 2"] = everything(engine), toy_train(engine, range(3, 5))
    found["fp16"] = half_precision(world, root)
    fresh = toy_engine(world, "deepspeed", 3)
    store, _ = checkpoint.open_store(root / "fresh")
    assert checkpoint.load_latest(store, fresh, world, seed=1) is None
    save_state(store, 0, fresh, world, {})
    found["before the first step"] = everything(fresh)
    other = toy_engine(world, "deepspeed", 1, seed=5)
    checkpoint.load_latest(store, other, world, seed=1)
    found["loaded before the first step"] = everything(other)
    found["errors"] = failures(world, store, fresh)
    return found


def half_precision(world: World, root: Path) -> Any:
    """fp16 is for GPUs; here the guards against it on a CPU are lifted, which is slow but computes the same things."""
    from deepspeed.accelerator import get_accelerator

    guards = engine_module._check, get_accelerator().is_fp16_supported
    engine_module._check = lambda *_: None
    get_accelerator().is_fp16_supported = lambda: True
    run = root / "fp16"
    engine = toy_engine(world, "deepspeed", 2, "fp16")
    before = toy_train(engine, range(12))  # the first scale is too high: some updates are skipped
    store, _ = checkpoint.open_store(run)
    save_state(store, 12, engine, world, {"position": 33})
    store.unlock()
    scale = engine.loss_scale_state()
    straight = toy_train(engine, range(12, 15)), everything(engine), engine.loss_scale_state()
    other = loaded(world, run, "deepspeed", 2, "fp16")
    again = other.loss_scale_state()
    resumed = toy_train(other, range(12, 15)), everything(other), other.loss_scale_state()
    engine_module._check, get_accelerator().is_fp16_supported = guards
    return [step[1] for step in before], scale, again, straight, resumed


def failures(world: World, store: Store, engine: Any) -> list[str]:
    """Each failure happens on rank 1 only, and every rank must hear of it."""
    messages = []

    def note(kind: type[Exception], action: Any, *args: Any) -> None:
        try:
            action(*args)
        except kind as error:
            messages.append(str(error))

    note(CheckpointError, checkpoint.load_latest, store, toy_engine(world, "local", width=6), world, 1)
    real = engine_state.save_file
    if world.rank == 1:
        engine_state.save_file = full_disk  # type: ignore[assignment]
    note(DiskError, save_state, store, 1, engine, world, {})
    engine_state.save_file = real
    local = toy_engine(world, "local")
    if world.rank == 1:
        with torch.no_grad():
            local.module.model.norm.bias[2] = float("nan")
    note(NonFiniteError, save_state, store, 1, local, world, {})
    if world.rank == 1:
        store.seal = unseen(store)  # type: ignore[method-assign]
    note(CheckpointError, save_state, store, 1, engine, world, {})
    left = sorted(path.name for path in store.folder.iterdir())
    return [*messages, *left]


def unseen(store: Store) -> Any:
    """Files that a rank wrote and sealed, and that a network file system does not show to the others."""

    def seal(staging: Path, names: list[str]) -> Any:
        sealed = Store.seal(store, staging, names)
        for name in names:
            (staging / name).unlink()
        return sealed

    return seal


def full_disk(tensors: Any, path: Path, metadata: Any = None) -> None:
    raise SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")


def one_rank_loads(world: World, root: Path) -> dict[str, Any]:
    found = {}
    for kind, stage in (("local", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 3)):
        engine = loaded(world, root / "stage 2 x 2", kind, stage)
        found[f"stage 2 x 2 -> {kind} {stage} x 1"] = everything(engine), toy_train(engine, range(3, 5))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    results = {"local x 1": run_ranks(one_rank_saves, 1, root)[0]}
    first, second = run_ranks(two_ranks, 2, root)
    results |= first
    results["second rank"] = second
    return results | run_ranks(one_rank_loads, 1, root)[0]


def same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert np.array_equal(value, other[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resume_is_bit_identical(case: Any, found: dict[str, Any]) -> None:
    for straight, resumed in (found[f"resume {case}"], found["second rank"][f"resume {case}"]):
        same(straight[0], resumed[0])
        assert straight[1] == resumed[1], "grad norms and losses of the updates after the resume"
        same(straight[2], resumed[2])
        assert straight[3] == resumed[3], "python's generator"


def test_fp16_resumes_with_its_loss_scale(found: dict[str, Any]) -> None:
    applied, scale, again, straight, resumed = found["fp16"]
    assert applied[0] is False and applied[-1] is True
    assert scale == again and 1 <= scale["cur_scale"] < 2**16 and scale["cur_iter"] == 12
    assert straight[0] == resumed[0] and straight[2] == resumed[2]
    same(straight[1], resumed[1])


def test_dropout_was_really_at_work(found: dict[str, Any]) -> None:
    straight, _ = found["resume ('local', 0, 'fp32')"]
    assert straight[1] != found["local x 1"][1]
    other_rank, _ = found["second rank"]["resume ('local', 0, 'fp32')"]
    assert straight[3] != other_rank[3]


MOVES = [
    *(f"stage 2 x 2 -> {where}" for where in ("local 0 x 2", "deepspeed 3 x 2")),
    *(f"stage 2 x 2 -> {where}" for where in ("local 0 x 1", "deepspeed 0 x 1", "deepspeed 1 x 1", "deepspeed 3 x 1")),
    *(f"local x 1 -> {where}" for where in ("local 0 x 2", "deepspeed 3 x 2")),
]


@pytest.mark.parametrize("move", MOVES)
def test_a_checkpoint_fits_every_engine(move: str, found: dict[str, Any]) -> None:
    source, wanted_steps = found[move.split(" -> ")[0]]
    state, steps = found[move]
    same(source, state)
    assert state["updates"] == 3 and np.abs(state["exp_avg/model.rare.weight"]).max() > 0
    np.testing.assert_allclose([s[0] for s in steps], [s[0] for s in wanted_steps], rtol=1e-6)


def test_state_exists_before_the_first_step(found: dict[str, Any]) -> None:
    same(found["before the first step"], found["loaded before the first step"])
    assert found["before the first step"]["updates"] == 0


def test_failures_reach_every_rank_and_commit_nothing(found: dict[str, Any]) -> None:
    assert found["errors"] == found["second rank"]["errors"]
    mismatch, full, non_finite, unseen, *left = found["errors"]
    assert "parameter `model.shared.weight` must be (7, 6), is (7, 5)" in mismatch
    assert "state-rank1.safetensors` cannot be written: No space left on device" in full
    assert non_finite.startswith("`param/model.norm.bias` is not finite: the state is not saved (rank 1 on ")
    assert "state-rank1.safetensors` must be there: a rank wrote it, it is not visible here" in unseen
    assert left == ["step-00000000"]


def test_files_and_tied_weights(root: Path, found: dict[str, Any]) -> None:
    (commit,) = (root / "stage 2 x 2" / "checkpoints").iterdir()
    names = sorted(path.name for path in commit.iterdir())
    ranks = [f"{kind}-rank{rank}.safetensors" for kind in ("rng", "state") for rank in (0, 1)]
    assert names == sorted(["manifest.json", "progress.json", "state.json", *ranks])
    assert not any("head.weight" in name for name in found["stage 2 x 2"][0])


def test_first_difference_is_named(tmp_path: Path) -> None:
    engine = toy_engine(ALONE, "local")
    engine_state.write(engine_state.copy(engine, {}), tmp_path)
    text = (tmp_path / "state.json").read_text()
    for old, new, message in (
        ("model.norm.weight", "model.norm.gain", "`model.norm.weight` must be there, is missing"),
        ('"parameters": {', '"parameters": {"extra": [1],', "it has no parameter `extra`"),
        ("model.constant_V", "model.other", "buffers must be"),
        ('"format": 1', '"format": 2', "`format` must be 1, is 2"),
        ('"ranks": 1', '"ranks": 2', "cannot be read"),
        ("{", "[", "cannot be read"),
    ):
        (tmp_path / "state.json").write_text(text.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=message) as caught:
            engine_state.load(engine, tmp_path)
        assert "\n" not in str(caught.value)


def test_generators_are_restored_or_seeded_anew(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return float(torch.rand(())), float(np.random.normal()), random.gauss(0, 1)

    rng.seed(1, 2, 3)
    draw()  # leaves half a gaussian pair behind in numpy and in python
    rng.capture().write(tmp_path / "rng.safetensors")
    wanted = [draw() for _ in range(3)]
    rng.seed(4)
    rng.restore(tmp_path / "rng.safetensors")
    assert [draw() for _ in range(3)] == wanted
    firsts: set[float] = set()
    for numbers in ((1, 5, 0), (1, 5, 1), (1, 6, 0), (2, 5, 0)):
        rng.seed(*numbers)
        firsts.update(draw())
    assert len(firsts) == 12


def test_resume_with_other_ranks_seeds_from_the_step(tmp_path: Path) -> None:
    engine = toy_engine(ALONE, "local")
    store, _ = checkpoint.open_store(tmp_path)
    path = save_state(store, 7, engine, ALONE, {"position": 1})
    checkpoint.load(path, engine, World(1, 4, 1, torch.device("cpu")), seed=3)
    resumed = torch.rand(4)
    rng.seed(3, 7, 1)
    assert torch.equal(resumed, torch.rand(4))


def test_progress_must_be_finite_json(tmp_path: Path) -> None:
    engine = toy_engine(ALONE, "local")
    store, _ = checkpoint.open_store(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_state(store, 1, engine, ALONE, {"loss": float("nan")})
    assert store.latest() is None


@given(st.lists(st.integers(0, 10**9), max_size=50), st.integers(1, 9))
def test_ranks_write_about_as_much_each(sizes: list[int], ranks: int) -> None:
    owners, loads = deal(sizes, ranks), [0] * ranks
    for size, owner in zip(sizes, owners, strict=True):
        loads[owner] += size
    assert max(loads) - min(loads) <= max(sizes, default=0)

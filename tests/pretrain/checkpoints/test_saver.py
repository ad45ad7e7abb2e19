"""Saves in the background: what is committed is what was copied, whatever training and the disk do meanwhile."""

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pretrain import rng
from pretrain.checkpoints import checkpoint
from pretrain.checkpoints import patience as patience_module
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.patience import Patience
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.seal import verify
from pretrain.distributed import World
from pretrain.engine import state
from pretrain.errors import CheckpointError, DiskError, DiskFullError, NonFiniteError, ParlanceError, Requeue
from tests.distributed_helper import run_ranks
from tests.pretrain.checkpoints.commits import Killed, Script, save_state, tidy
from tests.pretrain.toy_engine import toy_engine, toy_train

ALONE = World(0, 1, 0, torch.device("cpu"))
ENGINES = [("local", 0), *(("deepspeed", stage) for stage in range(4))]
FULL = errno.ENOSPC


class Held:
    """Stands for `state.save_file`: waits until it is let go, or refuses as a disk does."""

    def __init__(self, refusals: list[int] | None = None) -> None:
        self.go, self.refusals, self.real = threading.Event(), refusals or [], state.save_file
        state.save_file = self  # type: ignore[assignment]

    def __call__(self, tensors: Any, path: Path, metadata: Any = None) -> None:
        assert self.go.wait(60.0)
        if self.refusals:
            path.write_bytes(b"half of a file")
            code = self.refusals.pop(0)
            raise OSError(code, os.strerror(code), str(path))
        self.real(tensors, path, metadata)

    def away(self) -> None:
        state.save_file = self.real


def files(commit: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in commit.iterdir()}


def beside_training(world: World, root: Path) -> dict[str, Any]:
    """A save of every engine that is held back while training goes on, and the same save at once."""
    found: dict[str, Any] = {}
    for kind, stage in ENGINES:
        engine = toy_engine(world, kind, stage, dropout=0.3)
        rng.seed(11, world.rank)
        toy_train(engine, range(3))
        runs = [root / f"{kind} {stage} {how}" for how in ("at once", "beside")]
        stores = [checkpoint.open_store(run)[0] for run in runs]
        save_state(stores[0], 3, engine, world, {"position": 33})
        saver, held = Saver(stores[1], engine, world), Held()
        saver.start(3, {"position": 33})
        straight = toy_train(engine, range(3, 6))
        writing = saver.writing
        held.go.set()
        first = saver.finish()
        saver.start(6, {"position": 66})
        second = saver.finish()
        held.away()
        again = toy_engine(world, kind, stage, dropout=0.3, seed=5)
        checkpoint.load(stores[1].commits()[0], again, world, seed=1)
        found[f"{kind} {stage}"] = (
            writing,
            toy_train(again, range(3, 6)) == straight,
            first is not None,
            second is not None,
        )
        for store in stores:
            store.unlock()
    return found


def unlucky(world: World, root: Path) -> dict[str, Any]:
    """The disk of rank 1 refuses while both train on."""
    patience_module.RETRY = 0.01
    engine = toy_engine(world, "local")
    store, _ = checkpoint.open_store(root / "unlucky")
    save_state(store, 0, engine, world, {})
    told: list[tuple[str, bool]] = []
    found: dict[str, Any] = {"told": told}

    def saved(name: str, refusals: list[int], seconds: float, stopped: bool = False) -> None:
        saver = Saver(store, engine, world, 0, lambda store: (), Patience(seconds, lambda *one: told.append(one)))
        saver.patience.stopped = lambda: stopped and world.rank == 1
        held = Held(refusals if world.rank else [])
        held.go.set()
        try:
            saver.start(1, {})
            found[name] = saver.finish() is not None, saver.patience.paused > 0
        except ParlanceError as error:
            found[name] = type(error).__name__, str(error), error.shared
        held.away()
        found[name] += (sorted(path.name for path in store.folder.iterdir()), saver.writing)

    saved("impatient", [FULL], 0.0)
    saved("too long", [FULL] * 10_000, 0.2)
    saved("signal", [errno.EDQUOT], 60.0, stopped=True)
    saved("broken", [errno.EIO], 60.0)
    saved("read-only", [errno.EROFS], 60.0)
    saved("room", [FULL, errno.EDQUOT], 60.0)
    if world.rank == 1:
        with torch.no_grad():
            engine.module.model.norm.bias[2] = float("inf")
    saved("not finite", [], 60.0)
    store.unlock()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def both(world: World, root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return beside_training(world, root), unlucky(world, root)


@pytest.fixture(scope="module")
def found(root: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return run_ranks(both, 2, root)


@pytest.mark.parametrize("engine", [f"{kind} {stage}" for kind, stage in ENGINES])
def test_the_copy_is_committed_and_not_what_training_made_of_it(engine: str, root: Path, found: Any) -> None:
    for beside, _ in found:
        assert beside[engine] == (True, True, True, True)
    (whole,), (first, second) = (Store(root / f"{engine} {how}").commits() for how in ("at once", "beside"))
    assert files(first) == files(whole), "weights, moments, generators, progress and manifest, byte for byte"
    assert (first.name, second.name) == ("step-00000003", "step-00000006")
    before, after = (load_file(path / "state-rank0.safetensors") for path in (first, second))
    assert not torch.equal(before["param/model.shared.weight"], after["param/model.shared.weight"])


@pytest.mark.fault("disk full, over quota, read-only, EIO", trials=6)
def test_a_disk_that_refuses_beside_training(found: Any) -> None:
    first, second = (unlucky for _, unlucky in found)
    assert first["told"] == second["told"] and {**first, "told": 0} == {**second, "told": 0}, "all ranks know the same"
    staged = "state-rank1.safetensors` cannot be written: "
    for name, kind, message in (
        ("impatient", "DiskFullError", f"{staged}No space left on device (rank 1 on "),
        ("too long", "DiskFullError", f"{staged}No space left on device (rank 1 on "),
        ("signal", "Requeue", f"{staged}Disk quota exceeded (rank 1 on "),
        ("broken", "CheckpointError", f"{staged}Input/output error (rank 1 on "),
        ("read-only", "DiskError", f"{staged}Read-only file system (rank 1 on "),
        ("not finite", "NonFiniteError", "`param/model.norm.bias` is not finite"),
    ):
        error, text, shared, left, writing = first[name]
        assert (error, shared, writing) == (kind, True, False) and message in text and "\n" not in text
        assert left == (["step-00000000"] if name != "not finite" else ["step-00000000", "step-00000001"])
    assert first["room"] == (True, True, ["step-00000000", "step-00000001"], False)
    paused = [line for line, paused in first["told"] if paused]
    assert len(paused) == 3 and all(line.startswith("paused: `") for line in paused)
    assert [line.startswith("there is room again") for line, paused in first["told"] if not paused] == [True]
    for kind in (DiskFullError, DiskError, CheckpointError, Requeue, NonFiniteError):
        assert kind.exit_code == {"Requeue": 85, "NonFiniteError": 7, "CheckpointError": 5}.get(kind.__name__, 6)


def begun(run: Path, script: Script, patience: Patience | None = None) -> tuple[Saver, Any]:
    """A run with a commit of step 1, and a saver whose file operations are counted from here on."""
    rng.seed(5)
    engine, store = toy_engine(ALONE, "local"), Store(run)
    save_state(store, 1, engine, ALONE, {})
    store._hook = script
    return Saver(store, engine, ALONE, keep=1, patience=patience), engine


def life(saver: Saver, engine: Any) -> None:
    for step in (2, 3):
        saver.start(step, {"position": step})
        with torch.no_grad():
            engine.module.model.shared.weight.add_(1.0)
        saver.finish()


def test_full_once_at_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With patience nothing is lost: the save that met the full disk is committed, and the next one is, too."""
    monkeypatch.setattr(patience_module, "RETRY", 0.0)
    count = Script(0, Killed())
    calm = begun(tmp_path / "calm", count)
    life(*calm)
    assert count.seen > 40
    (wanted,) = calm[0].store.commits()
    for at in range(1, count.seen + 1, 2):
        for code in (FULL, errno.EDQUOT) if at % 3 else (FULL,):
            run = tmp_path / f"{at}-{code}"
            error = OSError(code, os.strerror(code), str(run))
            saver, engine = begun(run, Script(at, error), Patience(60.0))
            life(saver, engine)
            (commit,) = saver.store.commits()
            assert saver.patience.paused > 0 and files(commit) == files(wanted) and not verify(commit), at
            assert saver.store.pointer() == commit.name
            saver.store.recover()
            assert tidy(run)


def test_a_disk_without_room_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, _ = begun(tmp_path, Script(0, Killed()))
    told = SimpleNamespace(f_blocks=10, f_bfree=0, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: told)
    monkeypatch.setattr(state, "save_file", lambda *_: pytest.fail("nothing may be written"))
    saver.start(2, {})
    with pytest.raises(DiskFullError, match=r"state-rank0.safetensors` cannot be written: No space left on device"):
        saver.finish()
    monkeypatch.undo()
    told.f_blocks = 0  # a file system that does not know
    monkeypatch.setattr(os, "statvfs", lambda path: told)
    saver.start(2, {})
    assert saver.finish() is not None and tidy(tmp_path)


def test_memory_is_used_again(tmp_path: Path) -> None:
    saver, _ = begun(tmp_path, Script(0, Killed()))
    saver.start(2, {})
    memory = {key: value.data_ptr() for key, value in saver._memory.items()}
    with pytest.raises(RuntimeError, match="save of step 2 must be finished before that of step 3"):
        saver.start(3, {})
    saver.finish()
    saver.start(3, {})
    assert memory == {key: value.data_ptr() for key, value in saver._memory.items()} and len(memory) > 10
    assert saver.finish() is not None and saver.finish() is None


def test_an_error_that_nobody_foresaw_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, _ = begun(tmp_path, Script(0, Killed()))
    monkeypatch.setattr(state, "save_file", lambda *_: 1 // 0)
    saver.start(2, {})
    with pytest.raises(ZeroDivisionError):
        saver.finish()


def test_generators_are_those_of_the_copy(tmp_path: Path) -> None:
    saver, _ = begun(tmp_path, Script(0, Killed()))
    rng.seed(3)
    saver.start(2, {})
    wanted = float(torch.rand(())), float(np.random.normal())
    saved = saver.finish()
    assert saved is not None
    rng.restore(saved.path / "rng-rank0.safetensors")
    assert (float(torch.rand(())), float(np.random.normal())) == wanted


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", state.KEYS)
def test_nothing_that_is_not_finite_is_copied(key: str, value: float) -> None:
    engine = toy_engine(ALONE, "local")
    tensors = engine.whole("model.inner.weight")
    with torch.no_grad():
        tensors[key][1, 2] = value
    with pytest.raises(NonFiniteError, match=f"`{key}/model.inner.weight` is not finite"):
        state.copy(engine, {})

"""A run whose checkpoints are written in the background: what goes on meanwhile, and what stands when it ends early."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.__main__ import main
from pretrain.checkpoints.commit import Store
from pretrain.engine import StepResult, state
from pretrain.engine.local import LocalEngine
from pretrain.run import Run
from pretrain.runs import read_events
from tests.pretrain.runs import make_data, training_curve, write_config

PATIENCE = 60.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"), 60)


class Watched:
    """Counts updates, holds the writer of the save of step 3 until step 5 has begun, and can fail at step 5."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: Any = None) -> None:
        self.updates, self.written_at, self.ends = 0, [], ends  # type: ignore[var-annotated]
        self.step, self.save_file = LocalEngine.step, state.save_file
        monkeypatch.setattr(LocalEngine, "step", lambda engine, lr: self._step(engine, lr))
        monkeypatch.setattr(state, "save_file", self._save_file)

    def _step(self, engine: LocalEngine, lr: float) -> StepResult:
        self.updates += 1
        if self.updates == 5 and self.ends is not None:
            if isinstance(self.ends, Exception):
                raise self.ends
            return StepResult(float("nan"), False)
        return self.step(engine, lr)

    def _save_file(self, tensors: Any, path: Path) -> None:
        deadline = time.monotonic() + PATIENCE
        while "staging-00000003" in str(path) and self.updates < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        self.written_at.append(self.updates)
        self.save_file(tensors, path)


def commits(folder: Path) -> list[str]:
    return [path.name for path in Store(folder / "runs" / "tiny").intact()]


def test_training_goes_on_and_its_bits_are_those_of_saving_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, at_once = tmp_path / "beside", tmp_path / "at once"
    for folder, background in ((beside, "true"), (at_once, "false")):
        folder.mkdir()
        with monkeypatch.context() as patched:
            watched = Watched(patched) if background == "true" else None
            assert main(["train", str(write_config(folder, data)), f"train.async_save={background}"]) == 0
        assert watched is None or (watched.written_at[0] == 5 and watched.written_at[-1] == 6), watched.written_at
    one, other = (folder / "runs" / "tiny" for folder in (beside, at_once))
    assert commits(beside) == commits(at_once) == ["step-00000003", "step-00000006"]
    for name in commits(beside):
        for path in (one / "checkpoints" / name).iterdir():
            assert path.read_bytes() == (other / "checkpoints" / name / path.name).read_bytes(), path.name
    assert training_curve(one) == training_curve(other)
    for run in (one, other):
        saves = [event for event in read_events(run) if event["event"] == "save"]
        assert [event["step"] for event in saves] == [3, 6]
        assert all(event["save_seconds"] >= 0 and event["write_seconds"] > 0 for event in saves)
        assert all("paused_seconds" not in event for event in saves)


def test_what_was_begun_is_committed_when_an_update_fails(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Watched(monkeypatch, ends="not finite")
    assert main(["train", str(write_config(tmp_path, data))]) == 7
    assert commits(tmp_path) == ["step-00000003"]
    events = [(event["event"], event["step"]) for event in read_events(tmp_path / "runs" / "tiny")]
    assert events == [("start", 0), ("save", 3), ("error", 3)]


def test_what_was_begun_is_given_up_when_a_rank_ends_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        Watched(patched, ends=ZeroDivisionError("a bug"))
        with pytest.raises(ZeroDivisionError):
            main(["train", str(write_config(tmp_path, data))])
    for writer in threading.enumerate():  # it would have ended with its process
        if writer.name == "checkpoint":
            writer.join(PATIENCE)
    assert commits(tmp_path) == []
    assert main(["train", str(write_config(tmp_path, data))]) == 0
    assert commits(tmp_path) == ["step-00000003", "step-00000006"]


def test_a_weight_that_is_not_finite_ends_the_run_before_anything_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Run._save

    def broken(run: Run, progress: Any) -> None:
        with torch.no_grad():
            next(iter(run.engine.parameters().values())).view(-1)[0] = float("inf")
        save(run, progress)

    monkeypatch.setattr(Run, "_save", broken)
    assert main(["train", str(write_config(tmp_path, data))]) == 7
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    assert not folder.exists() or not list(folder.iterdir())

"""What the tests of the commit layer share: a script of saves, and what a commit of a step must hold."""

from pathlib import Path
from typing import Any

from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.saver import Saver
from pretrain.distributed import World


class Killed(BaseException):
    """As SIGKILL: nothing handles it."""


class Script:
    """A hook that does something at the n-th operation."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.seen = at, error, 0

    def __call__(self, operation: str, path: Path) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise self.error


def content(step: int) -> dict[str, bytes]:
    return {"state-rank0.safetensors": bytes([step % 251]) * (100 + step), "progress.json": b'{"step": %d}' % step}


def save(store: Store, step: int) -> None:
    staging = store.begin(step)
    for name, data in content(step).items():
        (staging / name).write_bytes(data)
    store.commit(staging, step, store.seal(staging, content(step)))


def save_state(store: Store, step: int, engine: Any, world: World, progress: dict[str, Any], keep: int = 0) -> Path:
    """The state of an engine, begun and committed at once."""
    saver = Saver(store, engine, world, keep)
    saver.start(step, progress)
    saved = saver.finish()
    assert saved is not None and saved.step == step
    return saved.path


def step_of(path: Path | None) -> int:
    assert path is not None
    step = int(path.name.removeprefix("step-"))
    assert {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"} == content(step)
    return step


def life(store: Store) -> None:
    """Everything a run does to the disk between two crashes: saves, retention, a step again, a save given up."""
    store.lock()
    store.recover()
    save(store, 3)
    store.retain(2)
    save(store, 4)
    store.retain(2)
    save(store, 4)
    store.retain(1)
    store.discard(store.begin(5))
    store.unlock()


def operations(tmp_path: Path) -> int:
    count = Script(0, Killed())
    prepare(tmp_path)
    life(Store(tmp_path, count))
    return count.seen


def prepare(run: Path) -> None:
    store = Store(run)
    for step in (1, 2):
        save(store, step)


def tidy(run: Path) -> bool:
    names = [p.name for p in (run / "checkpoints").iterdir()]
    return all(name.startswith("step-") for name in names)

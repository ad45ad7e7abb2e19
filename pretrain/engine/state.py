"""Engine state on disk: full fp32 tensors by parameter name, cut into one safetensors file per rank, and no pickle.

    state.json                 {"format", "ranks", "updates", "loss_scale", "parameters": {name: shape}, "buffers"}
    state-rank{r}.safetensors  param/NAME, exp_avg/NAME, exp_avg_sq/NAME of some parameters, buffer/NAME

Nothing in it depends on the engine, the ZeRO stage, the number of ranks or the degree of tensor parallelism that wrote
it. The tensors are written as they are in memory (fp32; float64 where a local run computes in it).
"""

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain import distributed
from pretrain.checkpoints.seal import read_json
from pretrain.engine.base import Engine, deal
from pretrain.errors import CheckpointError, NonFiniteError, ParlanceError

FORMAT = 1
INDEX = "state.json"
KEYS = ("param", "exp_avg", "exp_avg_sq")
# What reading a file of the right name and the wrong content can end in.
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, SafetensorError,
)  # fmt: skip


@dataclass(frozen=True)
class Copy:
    """The state of an engine as it was at one moment: this rank's share of it, in the memory of the host.

    tensors: by key in the file. index: what state.json says, on every rank.
    """

    rank: int
    tensors: dict[str, Tensor]
    index: dict[str, Any]

    @property
    def files(self) -> list[str]:
        """The names that `write` gives to its files."""
        return [_part(self.rank), *([] if self.rank else [INDEX])]


def copy(engine: Engine, memory: dict[str, Tensor]) -> Copy:
    """Copies the state of `engine` as fast as may be: training stands still meanwhile. Collective.

    memory: of an earlier copy of this engine, which is overwritten; what is missing there is added, pinned where the
        engine is on a CUDA device.

    Raises:
        NonFiniteError: naming the tensor that is not finite, on every rank.
    """
    rank, size, device = engine.world.rank, engine.world.size, engine.world.device
    shapes, buffers = engine.shapes(), engine.buffers()
    mine: dict[str, Tensor] = {}
    extremes: dict[str, Tensor] = {}  # minimum and maximum: two passes less than isfinite and no temporaries

    def keep(key: str, value: Tensor) -> None:
        if key not in memory:
            memory[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=device.type == "cuda")
        mine[key] = memory[key].copy_(value, non_blocking=True)

    for name, owner in zip(shapes, deal([math.prod(shape) for shape in shapes.values()], size), strict=True):
        state = engine.whole(name)
        for key in KEYS:
            extremes[f"{key}/{name}"] = torch.stack(torch.aminmax(state[key]))
            if owner == rank:
                keep(f"{key}/{name}", state[key])
    for name, buffer in buffers.items():
        if rank == 0:
            keep(f"buffer/{name}", buffer)
    finite = torch.isfinite(torch.stack(list(extremes.values()))).all(1).tolist()
    bad = next((name for name, good in zip(extremes, finite, strict=True) if not good), None)
    distributed.agree(NonFiniteError(f"`{bad}` is not finite: the state is not saved") if bad else None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    index_of: dict[str, Any] = {
        "format": FORMAT,
        "ranks": size,
        "updates": engine.updates,
        "loss_scale": engine.loss_scale_state(),
        "parameters": {name: list(shape) for name, shape in shapes.items()},
        "buffers": sorted(buffers),
    }
    return Copy(rank, mine, index_of)


def write(copied: Copy, folder: Path) -> None:
    """Writes this rank's share into `folder`; raises OSError where the disk refuses, on this rank only."""
    with os_errors(folder / _part(copied.rank)):
        save_file(copied.tensors, folder / _part(copied.rank))
    if copied.rank == 0:
        (folder / INDEX).write_text(json.dumps(copied.index, indent=1), encoding="utf-8")


def load(engine: Engine, folder: Path) -> None:
    """Sets the state of `engine` to what `write` wrote; every rank reads every file.

    Raises:
        CheckpointError: a file is missing or not readable, or a parameter does not fit the model.
    """
    error: ParlanceError | None = None
    try:
        index = read_json(folder / INDEX)
        _compare(index, engine, folder)
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(folder / _part(r), framework="pt")) for r in range(index["ranks"])]
            where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - not a dict
            for name, shape in engine.shapes().items():
                engine.write(name, {key: _tensor(where, f"{key}/{name}", shape) for key in KEYS})
            for name, buffer in engine.buffers().items():
                buffer.copy_(_tensor(where, f"buffer/{name}", tuple(buffer.shape)))
        engine.updates = int(index["updates"])
        if index["loss_scale"] is not None:
            engine.restore_loss_scale(index["loss_scale"])
    except CheckpointError as problem:
        error = problem
    except UNREADABLE as problem:
        reason = " ".join(str(problem).split())
        error = CheckpointError(f"`{folder}` cannot be read: {type(problem).__name__}: {reason}")
    distributed.agree(error)
    engine.refresh()


def _part(rank: int) -> str:
    return f"state-rank{rank}.safetensors"


def _tensor(where: dict[str, Any], key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that key; copying one of another shape or kind would broadcast or convert it in silence."""
    value: Tensor = where[key].get_tensor(key)
    if tuple(value.shape) != shape or not value.is_floating_point():
        raise ValueError(f"`{key}` must be floating point {shape}, is {value.dtype} {tuple(value.shape)}")
    return value


def _compare(index: dict[str, Any], engine: Engine, folder: Path) -> None:
    if index["format"] != FORMAT:
        raise CheckpointError(f"`{folder / INDEX}`: `format` must be {FORMAT}, is {index['format']!r}")
    saved = {name: tuple(shape) for name, shape in index["parameters"].items()}
    wanted = engine.shapes()
    for name, shape in wanted.items():
        if name not in saved:
            raise CheckpointError(f"`{folder}` does not fit the model: parameter `{name}` must be there, is missing")
        if saved[name] != shape:
            raise CheckpointError(
                f"`{folder}` does not fit the model: parameter `{name}` must be {shape}, is {saved[name]}"
            )
    for name in saved:
        if name not in wanted:
            raise CheckpointError(f"`{folder}` does not fit the model: it has no parameter `{name}`")
    if set(index["buffers"]) != set(engine.buffers()):
        raise CheckpointError(
            f"`{folder}` does not fit the model: buffers must be {sorted(engine.buffers())}, are {index['buffers']}"
        )


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raises the OSError that safetensors hides in the message of its own (`... (os error 28)`)."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error

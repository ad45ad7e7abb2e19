"""Engine state on disk: full fp32 tensors by parameter name, cut into one safetensors file per rank, and no pickle.

    state.json                 {"format", "ranks", "updates", "loss_scale", "parameters": {name: shape}, "buffers"}
    state-rank{r}.safetensors  param/NAME, exp_avg/NAME, exp_avg_sq/NAME of every ranks-th parameter, buffer/NAME

Nothing in it depends on the engine, the ZeRO stage, the number of ranks or the degree of tensor parallelism that wrote
it. The tensors are written as they are in memory (fp32; float64 where a local run computes in it).
"""

import errno
import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain import distributed
from pretrain.checkpoints.seal import read_json
from pretrain.engine.base import Engine
from pretrain.errors import CheckpointError, NonFiniteError, ParlanceError

FORMAT = 1
INDEX = "state.json"
KEYS = ("param", "exp_avg", "exp_avg_sq")
# What reading a file of the right name and the wrong content can end in.
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, SafetensorError,
)  # fmt: skip


def save(engine: Engine, folder: Path) -> list[str]:
    """Writes this rank's share of the state of `engine` into `folder` and returns the names of its files.

    Raises:
        NonFiniteError: naming the tensor that is not finite, on every rank; nothing is written then.
        OSError: the disk refuses, on this rank only.
    """
    rank, size = engine.world.rank, engine.world.size
    shapes = engine.shapes()
    mine: dict[str, Tensor] = {}
    bad: str | None = None
    for index, name in enumerate(shapes):
        state = engine.read(name)
        bad = bad or next((f"{key}/{name}" for key in KEYS if not torch.isfinite(state[key]).all()), None)
        if index % size == rank:
            mine |= {f"{key}/{name}": state[key].contiguous() for key in KEYS}
    buffers = engine.buffers()
    if rank == 0:
        mine |= {f"buffer/{name}": buffer.cpu().contiguous() for name, buffer in buffers.items()}
    distributed.agree(NonFiniteError(f"`{bad}` is not finite: the state is not saved") if bad else None)
    try:
        save_file(mine, folder / _part(rank))
    except SafetensorError as error:
        raise _os_error(error, folder / _part(rank)) from error
    if rank == 0:
        index_of: dict[str, Any] = {
            "format": FORMAT,
            "ranks": size,
            "updates": engine.updates,
            "loss_scale": engine.loss_scale_state(),
            "parameters": {name: list(shape) for name, shape in shapes.items()},
            "buffers": sorted(buffers),
        }
        (folder / INDEX).write_text(json.dumps(index_of, indent=1), encoding="utf-8")
    return [_part(rank), INDEX] if rank == 0 else [_part(rank)]


def load(engine: Engine, folder: Path) -> None:
    """Sets the state of `engine` to what `save` wrote; every rank reads every file.

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


def _os_error(error: SafetensorError, path: Path) -> OSError:
    """The OSError that safetensors hides in its message (`... (os error 28)`)."""
    code = re.search(r"os error (\d+)", str(error))
    number = int(code[1]) if code else errno.EIO
    return OSError(number, os.strerror(number), str(path))

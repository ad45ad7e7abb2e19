"""The random generators of one process: torch on CPU and CUDA, numpy, Python. Written and restored to the bit."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

WORDS = 624  # of the Mersenne twister
TORCH_BYTES = 5056  # of its state in torch


@dataclass(frozen=True)
class Generators:
    """The state of every generator of a process at one moment, as it is filed."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def write(self, path: Path) -> None:
        """Writes a safetensors file that `restore` reads."""
        save_file(self.tensors, path, metadata=self.metadata)


def capture() -> Generators:
    """The state of every generator of this process now."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    rest = {"numpy": [position, has_gauss, cached], "python": [version, gauss]}
    return Generators(tensors, {"rest": json.dumps(rest)})


def restore(path: Path) -> None:
    """Sets every generator to what was captured and written; raises one of `engine.state.UNREADABLE` otherwise."""
    state = _read(path)
    torch.set_rng_state(state.cpu)
    if state.cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.cuda)
    np.random.set_state(state.numpy)
    random.setstate(state.python)


def check(path: Path) -> None:
    """Raises as `restore` does, and sets nothing."""
    _read(path)


@dataclass(frozen=True)
class _State:
    """Of each generator, as it takes it."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None
    numpy: tuple[Any, ...]
    python: tuple[Any, ...]


def _read(path: Path) -> _State:
    """What `write` wrote, tried on generators of its own first."""
    with safe_open(path, framework="pt") as file:
        rest: dict[str, Any] = json.loads(file.metadata()["rest"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    kinds = {"numpy": (torch.int64, WORDS), "python": (torch.int64, WORDS + 1), "torch": (torch.uint8, TORCH_BYTES)}
    for name, (dtype, count) in kinds.items():
        found = tensors[name]
        # A shorter one would be read beyond its end, another kind converted in silence.
        if found.dtype != dtype or tuple(found.shape) != (count,):
            raise ValueError(
                f"{name}'s generator must have {count} words of {dtype}, has {list(found.shape)} of {found.dtype}"
            )
        if not 0 <= int(found.min()) <= int(found.max()) < 1 << 32:
            raise ValueError(
                f"{name}'s generator must be of 32-bit words, has {int(found.min())} to {int(found.max())}"
            )
    position, has_gauss, cached = rest["numpy"]
    if type(position) is not int or not 0 <= position <= WORDS:
        raise ValueError(f"numpy's generator must have {WORDS} words, stands at {position!r:.80}")
    version, gauss = rest["python"]
    words = tuple(tensors["python"].tolist())
    state = _State(
        cpu=tensors["torch"],
        cuda=tensors.get("cuda"),
        numpy=("MT19937", tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached),
        python=(version, words, None if gauss is None else float(gauss)),
    )
    torch.Generator().set_state(state.cpu)
    np.random.RandomState().set_state(state.numpy)
    random.Random().setstate(state.python)
    return state


def seed(*numbers: int) -> None:
    """Seeds every generator from `numbers`, each combination independently of the others."""
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence(numbers).generate_state(3)
    torch.manual_seed(int(torch_seed))
    np.random.seed(int(numpy_seed))
    random.seed(int(python_seed))


@contextmanager
def put_back_on(kind: type[BaseException]) -> Iterator[None]:
    """Where the block raises `kind`, torch's generators are as they were before it."""
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    except kind:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        raise

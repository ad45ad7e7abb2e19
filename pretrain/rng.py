"""The random generators of one process: torch on CPU and CUDA, numpy, Python. Written and restored to the bit."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

WORDS = 624  # of the Mersenne twister


def save(path: Path) -> None:
    """Writes the state of every generator of this process as a safetensors file."""
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
    save_file(tensors, path, metadata={"rest": json.dumps(rest)})


def restore(path: Path) -> None:
    """Sets every generator to what `save` wrote; raises one of `engine.state.UNREADABLE` for anything else."""
    with safe_open(path, framework="pt") as file:
        rest: dict[str, Any] = json.loads(file.metadata()["rest"])
        torch.set_rng_state(file.get_tensor("torch"))
        if "cuda" in file.keys() and torch.cuda.is_available():  # noqa: SIM118 - not a dict
            torch.cuda.set_rng_state(file.get_tensor("cuda"))
        keys, (position, has_gauss, cached) = file.get_tensor("numpy").numpy().astype(np.uint32), rest["numpy"]
        if keys.shape != (WORDS,) or not 0 <= position <= WORDS:  # numpy would read beyond its state
            raise ValueError(f"numpy's generator must have {WORDS} words, has {keys.shape}, at {position!r:.80}")
        np.random.set_state(("MT19937", keys, position, has_gauss, cached))
        version, gauss = rest["python"]
        if gauss is not None:
            gauss = float(gauss)
        random.setstate((version, tuple(file.get_tensor("python").tolist()), gauss))


def seed(*numbers: int) -> None:
    """Seeds every generator from `numbers`, each combination independently of the others."""
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence(numbers).generate_state(3)
    torch.manual_seed(int(torch_seed))
    np.random.seed(int(numpy_seed))
    random.seed(int(python_seed))

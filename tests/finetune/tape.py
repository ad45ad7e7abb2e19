"""A CUDA graph on a CPU: the operations of a function are recorded once and then repeated without it.

As in a CUDA graph, what is repeated has the shapes, the numbers and the memory of the recording, and reads no Python
variable again. What a graph could not hold is refused while recording.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.decoding import Generated
from finetune.decoding.graphs import Graphed

REFUSED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")


def tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storages(*values: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(*values)}


def refuse(function: Any, *arguments: Any) -> None:
    """Raises for what syncs, has a shape that depends on values, or comes from the host's memory."""
    name, given = str(function), tensors(*arguments)
    boolean = name in INDEXING and any(x.dtype == torch.bool for x in given[1:2])
    if name == "aten.lift_fresh.default" or boolean or len({x.device.type for x in given}) > 1:
        raise AssertionError(f"a CUDA graph cannot hold {name} here")
    if name not in INDEXING and REFUSED & set(getattr(function, "tags", ())):
        raise AssertionError(f"a CUDA graph cannot hold {name}")


class Tape(TorchDispatchMode):
    """Records what runs inside; `replay` repeats it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not str(func).startswith("prim."):
            refuse(func, args, kwargs, out)
            self.launches.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.launches:
            in_place = func._schema.is_mutable
            if storages(out) <= storages(args, kwargs) and not in_place:
                continue  # a view of what is there
            made = func(*args, **kwargs)
            if not in_place:
                for old, new in zip(tensors(out), tensors(made), strict=True):
                    old.copy_(new)


def taped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes `Graphed` do on a CPU what it does on a GPU; the list gets a 1 for every replay."""
    replays: list[int] = []

    def call(self: Graphed) -> None:
        self.calls += 1
        if self.calls == 1:
            self.run()
        elif self.calls == 2:
            self.graph = Tape()  # type: ignore[assignment]
            with self.graph:  # type: ignore[union-attr]
                self.run()
        else:
            replays.append(1)
            self.graph.replay()  # type: ignore[union-attr]

    monkeypatch.setattr(Graphed, "__call__", call)
    return replays


def same(one: Generated, other: Generated) -> None:
    assert [tokens.tolist() for tokens in one.tokens] == [tokens.tolist() for tokens in other.tokens]
    assert one.scores == pytest.approx(other.scores, abs=1e-10)
    assert (one.passes, one.n_best) == (other.passes, other.n_best)

"""What an engine is: accumulation, update and evaluation on this rank, and its weights by parameter name."""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import optim
from pretrain.distributed import World
from pretrain.engine.calls import CallGuard
from pretrain.engine.tensor_parallel import TensorParallel
from pretrain.objectives.base import LossSums, ObjectiveModule, Packed


@dataclass(frozen=True)
class StepResult:
    """What became of one update.

    grad_norm: L2 norm of the global gradient before clipping; inf or nan where it was not finite.
    applied: False if the gradient was not finite: weights and optimizer state are then untouched.
    loss_scale: the dynamic loss scale of fp16 after the step, None in other precisions.
    """

    grad_norm: float
    applied: bool
    loss_scale: float | None = None


def deal(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that keeps or writes each parameter: the largest first, each by the rank that has least until then."""
    owners, loads = [0] * len(sizes), [(0, rank) for rank in range(ranks)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, owners[index] = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], owners[index]))
    return owners


class Engine(ABC):
    """Gradient accumulation, update, evaluation and state of one ObjectiveModule on this rank.

    module: weights in the precision of the forward.
    whole_gradients: a gradient of any weight can be computed on this rank alone.
    loss_factor: the loop passes scale[term] = weight * loss_factor / global_count, and the applied gradient is then the
        exact gradient of the global batch: the number of ranks where gradients are averaged over ranks, 1 where summed.
    """

    module: ObjectiveModule
    world: World
    loss_factor: float
    whole_gradients: bool = True
    guard: CallGuard | None = None
    shared_by: TensorParallel | None = None  # ranks that have a part of the model each
    _adam: torch.optim.Optimizer

    def accumulate(self, batches: Sequence[Packed], scale: Mapping[str, float]) -> LossSums:
        """Forward and backward of every micro-batch of one update; empty ones run too. Call `step` after it.

        Every rank passes the same number of micro-batches, at least one.

        Returns:
            {term: float64 scalar on this rank's device}, unweighted sums over this rank's micro-batches, detached.
        """
        self.module.train()
        self._open_window()
        sums: LossSums = {}
        for index, batch in enumerate(batches):
            terms = self._forward_backward(batch.to(self.world.device), scale, last=index == len(batches) - 1)
            _add(sums, terms)
        self._no_more_calls()
        return sums

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Packed]) -> LossSums:
        """Sums of every term over this rank's `batches`, without dropout and without gradients; collective."""
        scale = dict.fromkeys(self.module.objective.weights, 1.0)
        self.module.eval()
        sums: LossSums = {}
        for batch in batches:
            _add(sums, self._forward(batch.to(self.world.device), scale))
        self._no_more_calls()
        self.module.train()
        return sums

    @abstractmethod
    def step(self, lr: float) -> StepResult:
        """Clips the accumulated gradient, applies one update with learning rate `lr` unless a gradient is not
        finite, and clears the gradients; collective."""

    @abstractmethod
    def drop(self) -> None:
        """Throws the accumulated gradient away, in the place of `step`; collective."""

    @abstractmethod
    def gathered(self) -> AbstractContextManager[None]:
        """Inside, every weight of `module` is whole on every rank (ZeRO-3 shards them elsewhere); collective."""

    def full_weights(self) -> dict[str, Tensor]:
        """{name in `module`: fp32 CPU tensor} of parameters (tied ones once) and persistent buffers, on rank 0.

        Other ranks get an empty dict; collective.
        """
        weights = {name: self.read(name)["param"] for name in self.parameters()}
        weights |= {name: buffer.float().cpu() for name, buffer in self.buffers().items()}
        return weights if self.world.rank == 0 else {}

    # ------------------------------------------------- state, by parameter name

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of `module` by name; a tied one once, under its first name."""
        return dict(self.module.named_parameters())

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers of `module` by name."""
        weights = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        state = self.module.state_dict(keep_vars=True)
        return {name: value.detach() for name, value in state.items() if name not in weights}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The full shape of every parameter."""
        shapes = self._shapes()
        return shapes if (by := self.shared_by) is None else {n: by.shape(n, shape) for n, shape in shapes.items()}

    def whole(self, name: str) -> dict[str, Tensor]:
        """{"param", "exp_avg", "exp_avg_sq"}: the full master tensors of a parameter, wherever they are; collective.

        They may be the very tensors that the next update changes.
        """
        state = self._whole(name)
        return state if (by := self.shared_by) is None else {key: by.whole(name, part) for key, part in state.items()}

    def read(self, name: str) -> dict[str, Tensor]:
        """What `whole` finds, copied to the CPU; collective."""
        return {key: value.cpu().clone() for key, value in self.whole(name).items()}

    def write(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Sets some or all of what `read` returns; takes effect for the forward with `refresh`."""
        by = self.shared_by
        self._write(name, state if by is None else {key: by.part(name, whole) for key, whole in state.items()})

    @abstractmethod
    def refresh(self) -> None:
        """Copies the master weights into the weights of the forward; collective."""

    @property
    def updates(self) -> int:
        """Updates the optimizer has counted (its bias correction); the same for every parameter."""
        return optim.updates(self._adam)

    @updates.setter
    def updates(self, count: int) -> None:
        optim.set_updates(self._adam, count)

    def loss_scale_state(self) -> dict[str, float] | None:
        """State of the dynamic loss scale; None where the precision has none."""
        return None

    def restore_loss_scale(self, state: Mapping[str, float]) -> None:  # noqa: B027 - most precisions have none
        """Sets what `loss_scale_state` returned."""

    # ---------------------------------------------------------- implementation

    def _no_more_calls(self) -> None:
        if self.guard is not None:
            self.guard.end()

    def _open_window(self) -> None:  # noqa: B027 - most engines have nothing to prepare
        """Called before the first micro-batch of an update."""

    @abstractmethod
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """`shapes` of what this rank and its data-parallel ranks have; so `_whole` and `_write`."""

    @abstractmethod
    def _whole(self, name: str) -> dict[str, Tensor]: ...

    @abstractmethod
    def _write(self, name: str, state: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def _forward(self, batch: Any, scale: Mapping[str, float]) -> LossSums: ...

    @abstractmethod
    def _forward_backward(self, batch: Any, scale: Mapping[str, float], last: bool) -> LossSums: ...


def clip(masters: Mapping[nn.Parameter, Tensor], limit: float, shared_by: TensorParallel | None = None) -> float:
    """Scales the gradients so that their global norm is at most `limit` (0: any); returns the norm before.

    masters: {parameter: the tensor that has its gradient}.
    """
    gradients = [(p, master.grad) for p, master in masters.items() if master.grad is not None]
    norm = shared_by.norm(gradients) if shared_by else nn.utils.get_total_norm([grad for _, grad in gradients])
    if limit > 0:
        nn.utils.clip_grads_with_norm_(masters.values(), limit, norm)
    return float(norm)


@contextmanager
def nothing_to_gather() -> Iterator[None]:
    """`gathered` of engines that keep every weight whole."""
    yield


def _add(sums: LossSums, terms: Mapping[str, Tensor]) -> None:
    for name, value in terms.items():
        value = value.detach().double()
        sums[name] = sums[name] + value if name in sums else value

"""Do all ranks call the same modules in the same order? ZeRO-3 gathers weights module by module, and hangs if not.

A debugging aid (`engine.check_calls`): before every module each rank tells the others which one it is about to call.
The first that differs is named at once, where a run without the check would wait for ever.
"""

import torch
from torch import distributed as dist
from torch import nn

from pretrain.distributed import World

END = -1


class CallGuard:
    """Hooks on every module of a model that is about to be wrapped. Does nothing in a world of one."""

    def __init__(self, module: nn.Module, world: World) -> None:
        self.names = [name or "the model" for name, _ in module.named_modules()]
        self.size, self.calls = world.size, 0
        if world.size < 2:
            return
        self.group = dist.new_group(backend="gloo")  # its own: the engine's collectives may be under way
        for number, (_, part) in enumerate(module.named_modules()):
            part.register_forward_pre_hook(lambda *_, number=number: self._tell(number))

    def end(self) -> None:
        """No more calls come: raises where another rank still makes some."""
        if self.size > 1:
            self._tell(END)
        self.calls = 0

    def _tell(self, number: int) -> None:
        mine = torch.tensor([number])
        told = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(told, mine, group=self.group)
        self.calls += 1
        numbers = [int(other) for other in told]
        if len(set(numbers)) > 1:
            who = ", ".join(f"rank {rank} {self._name(other)}" for rank, other in enumerate(numbers))
            raise RuntimeError(f"ranks must call the same modules in the same order; call {self.calls} is: {who}")

    def _name(self, number: int) -> str:
        return "is done" if number == END else f"calls `{self.names[number]}`"

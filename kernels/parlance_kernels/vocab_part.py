"""A vocabulary cut over ranks: each has some columns of the logits, and sums over the vocabulary are sums over ranks.

Every method is collective over `group`. No gradient flows through any of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist


class VocabPart(NamedTuple):
    """The tokens `start` .. `start + size - 1` of a vocabulary of `whole` tokens; ranks of `group` have the others.

    Parts lie in the order of ranks, and all but the last are as large as the largest.
    """

    start: int
    size: int
    whole: int
    group: dist.ProcessGroup

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Maximum over the ranks, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def every(self, values: Tensor) -> Tensor:
        """[ranks, ...]: the values of each rank."""
        found = [torch.empty_like(values) for _ in range(self.group.size())]
        dist.all_gather(found, values.contiguous(), group=self.group)
        return torch.stack(found)

    def joined(self, logits_LV: Tensor) -> Tensor:
        """Logits over the whole vocabulary from those of this part."""
        most = -(-self.whole // self.group.size())
        padded_LV = torch.nn.functional.pad(logits_LV, (0, most - self.size))
        return torch.cat(list(self.every(padded_LV)), dim=1)[:, : self.whole]

    def place(self, token_L1: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each token among those of this part, 0 for one that another rank has; and whether it is here."""
        column_L1 = token_L1 - self.start
        here_L1 = (column_L1 >= 0) & (column_L1 < self.size)
        return torch.where(here_L1, column_L1, 0), here_L1

    def best(self, value_L: Tensor, column_L: Tensor) -> tuple[Tensor, Tensor]:
        """(largest value, its token) of all parts from the best of each; of equal ones the lowest token."""
        values_PL, tokens_PL = self.every(value_L), self.every(column_L + self.start)
        best = values_PL.max(dim=0)
        return best.values, tokens_PL.gather(0, best.indices[None])[0]

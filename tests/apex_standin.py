"""NVIDIA's `apex.optimizers.FusedAdam` as its documentation has it, for machines without one.

Differences from torch's AdamW that count here: `step` is an int of the parameter group, the moments are float32 made at
the first gradient, and `zero_grad` takes no argument and leaves no gradients.
"""

import types

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        amsgrad=False, set_grad_none=True,
    ):  # fmt: skip
        assert bias_correction and set_grad_none and not amsgrad
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
                decay, gradient = group["weight_decay"], p.grad
                if not self.adam_w_mode:  # L2 regularisation
                    gradient, decay = gradient + decay * p, 0.0
                state["exp_avg"].mul_(first).add_(gradient, alpha=1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                mean = state["exp_avg"] / (1 - first ** group["step"])
                root = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt()
                p -= group["lr"] * (mean / (root + group["eps"]) + decay * p)


def module():
    """What `import apex` gives."""
    made = types.ModuleType("apex")
    made.__file__ = __file__
    made.optimizers = types.SimpleNamespace(FusedAdam=FusedAdam)
    return made

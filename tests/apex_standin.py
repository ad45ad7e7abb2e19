"""Two classes of NVIDIA's apex as its documentation has them, for machines without one.

`optimizers.FusedAdam`; differences from torch's AdamW that count here: `step` is an int of the parameter group, the
moments are float32 made at the first gradient, and `zero_grad` takes no argument and leaves no gradients.

`normalization.FusedLayerNorm`, memory-efficient: its backward has the output and no input.
"""

import sys
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


class _FromOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean = x.mean(dim=-1, keepdim=True)
        scale = (x.var(dim=-1, unbiased=False, keepdim=True) + eps).rsqrt()
        y = (x - mean) * scale * weight + bias
        ctx.save_for_backward(y, scale, weight, bias)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale, weight, bias = ctx.saved_tensors
        normal, inner = (y - bias) / weight, grad * weight
        means = inner.mean(dim=-1, keepdim=True), (inner * normal).mean(dim=-1, keepdim=True)
        rows = tuple(range(grad.dim() - 1))
        return (inner - means[0] - normal * means[1]) * scale, (grad * normal).sum(rows), grad.sum(rows), None


class FusedLayerNorm(torch.nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        assert elementwise_affine and memory_efficient
        self.normalized_shape, self.eps = tuple(normalized_shape), eps
        self.weight, self.bias = (torch.nn.Parameter(torch.empty(normalized_shape)) for _ in range(2))

    def forward(self, x):
        return _FromOutput.apply(x, self.weight, self.bias, self.eps)


def modules():
    """What `import apex` puts into `sys.modules`."""
    made = {name: types.ModuleType(name) for name in ("apex", "apex.optimizers", "apex.normalization")}
    made["apex"].__file__, made["apex"].__path__ = __file__, []
    made["apex"].optimizers, made["apex"].normalization = made["apex.optimizers"], made["apex.normalization"]
    made["apex.optimizers"].FusedAdam = FusedAdam
    made["apex.normalization"].FusedLayerNorm = FusedLayerNorm
    return made


def install():
    sys.modules.update(modules())

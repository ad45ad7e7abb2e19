"""LayerNorms of NVIDIA's apex in place of torch's: for the backward they keep the output, which the next layer keeps
anyway, and not the input."""

from typing import Any

from torch import nn

from pretrain import nvidia_apex


def apex_layer_norm() -> Any:
    """The class `FusedLayerNorm` of NVIDIA's apex; raises ConfigError where there is none."""
    return nvidia_apex.part("normalization.FusedLayerNorm", "`engine.layer_norm` apex", "torch")


def take_apex_norms(model: nn.Module) -> None:
    """Replaces every LayerNorm in `model`; weights and their names stay."""
    fused = apex_layer_norm()
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm) is nn.LayerNorm:
                made = fused(norm.normalized_shape, eps=norm.eps, memory_efficient=True)
                made.weight, made.bias = norm.weight, norm.bias
                setattr(parent, name, made)

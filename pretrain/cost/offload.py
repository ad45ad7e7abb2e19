"""Bytes that one rank moves in an update because something is kept in the memory of its host, from the shapes alone.

With N numbers in the rank's share of the model, as deepspeed 0.19 does it:
    gradients down  once they are summed. Where they are summed in the host (ZeRO-3, and float32) each micro-batch
                    comes down too, and the sum goes up to the GPU to be added to
    weights up      after the update; with `offload: all` for every forward and backward of a micro-batch instead
    Adam            reads weight, two moments and gradient and writes all but the gradient, in float32; clipping reads
                    and writes the gradient; the weights are read and rounded
"""

from torch import nn

from pretrain.config import EngineConfig
from pretrain.cost.memory import FULL, part_sizes

ADAM, CLIP = 7 * FULL, 2 * FULL  # bytes of each number


def pcie_payload(model: nn.Module, engine: EngineConfig, ranks: int, micros: int) -> dict[str, int]:
    """{what: bytes} between one of `ranks` data-parallel ranks and its host; `model` may be on `meta`."""
    if engine.offload == "none":
        return {}
    share, low, stage = _share(model, engine, ranks), _low(engine), engine.zero_stage
    down, up = 1, 0
    if stage == 3:
        down, up = micros + 1, micros
    elif engine.precision == "fp32" and micros > 1:
        down, up = micros + 1, micros - 1
    gathered = 2 * micros if engine.offload == "all" else 1
    return {
        "gradients down": FULL * down * share,
        "gradients up": FULL * up * share,
        "weights up": low * gathered * share,
    }


def adam_bytes(model: nn.Module, engine: EngineConfig, ranks: int) -> int:
    """Bytes that the update of one of `ranks` data-parallel ranks moves in the memory of the host."""
    if engine.offload == "none":
        return 0
    return (ADAM + CLIP + FULL + _low(engine)) * _share(model, engine, ranks)


def _share(model: nn.Module, engine: EngineConfig, ranks: int) -> int:
    return -(-sum(part_sizes(model, engine.tensor_parallel)) // ranks)


def _low(engine: EngineConfig) -> int:
    return FULL if engine.precision == "fp32" else 2

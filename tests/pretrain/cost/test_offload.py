"""What offload moves, against counts by hand: a model of 20 numbers, of which each of 4 ranks has 5."""

import pytest
from torch import nn

from pretrain.config import EngineConfig
from pretrain.cost.offload import adam_bytes, pcie_payload

MICROS = 3


@pytest.mark.parametrize(
    ("engine", "micros", "down", "up", "weights", "adam"),
    [
        # bytes of a number down and up, with each of: gradients are added up on the GPU and come down once
        ({"zero_stage": 2, "precision": "bf16"}, MICROS, 4, 0, 2, 42),
        ({"zero_stage": 1, "precision": "fp32"}, 1, 4, 0, 4, 44),
        # float32 sums lie in the host: down, up and down, up and down, and down for Adam
        ({"zero_stage": 2, "precision": "fp32"}, MICROS, 16, 8, 4, 44),
        # ZeRO-3 takes the first one back up, too
        ({"zero_stage": 3, "precision": "bf16"}, MICROS, 16, 12, 2, 42),
        ({"zero_stage": 3, "precision": "fp32"}, 1, 8, 4, 4, 44),
        # weights are gathered from the host, three times for a forward and three for a backward
        ({"zero_stage": 3, "precision": "bf16", "offload": "all"}, MICROS, 16, 12, 12, 42),
    ],
)
def test_bytes_of_each_number_of_a_share(engine, micros, down, up, weights, adam):
    model, config = nn.Linear(3, 5), EngineConfig(**{"offload": "optimizer", **engine})
    moved = {"gradients down": 5 * down, "gradients up": 5 * up, "weights up": 5 * weights}
    assert pcie_payload(model, config, 4, micros) == moved
    assert adam_bytes(model, config, 4) == 5 * adam
    assert adam_bytes(model, config, 3) == 7 * adam, "the largest share"


def test_without_offload_nothing_moves():
    config = EngineConfig(zero_stage=3)
    assert pcie_payload(nn.Linear(3, 5), config, 4, MICROS) == {} and adam_bytes(nn.Linear(3, 5), config, 4) == 0

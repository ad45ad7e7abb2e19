"""What `plan` says that a rank holds, against the tensors that DeepSpeed and torch really allocate.

Bytes of tensors, not of processes: what is alive between updates, and how far an update rises above it. On a CPU what
is offloaded lies in the same memory, so both sides count it.
"""

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist

from pretrain import objectives
from pretrain.config import EngineConfig, ModelConfig, OptimConfig
from pretrain.cost.communication import ALL_REDUCE, tensor_parallel_payload
from pretrain.cost.memory import activation_bytes, part_sizes, rank_memory
from pretrain.distributed import World
from pretrain.engine import build, state
from pretrain.models import EncoderDecoder
from pretrain.objectives import ObjectiveModule
from tests.distributed_helper import run_ranks
from tests.pretrain.objectives.cases import IDS, WHOLE, unit_scale

SHAPE = ModelConfig(
    vocab_size=2000, d_model=128, encoder_layers=2, decoder_layers=2, heads=4, ffn_dim=512, max_positions=64
)
QUICK = [{"zero_stage": 3}, {"zero_stage": 2, "tensor_parallel": 2}]
SLOW = [
    *({"zero_stage": stage} for stage in range(4)),
    *({"zero_stage": stage, "precision": "bf16"} for stage in range(1, 4)),
    *({"zero_stage": stage, "offload": "optimizer"} for stage in range(1, 4)),
    {"zero_stage": 3, "offload": "all"},
    {"zero_stage": 3, "offload": "all", "precision": "bf16"},
    {"zero_stage": 2, "activation_checkpointing": True},
    {"zero_stage": 1, "tensor_parallel": 2, "precision": "bf16"},
    {"zero_stage": 3, "tensor_parallel": 2, "activation_checkpointing": True},
]


def alive() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in gc.get_objects():
            if isinstance(one, torch.Tensor) and one.device.type == "cpu":
                found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(found.values())


def highest(trace: Path) -> int:
    """The most bytes above the beginning of a profile with `profile_memory`."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    level = worst = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        level += event["args"]["Bytes"]
        worst = max(worst, level)
    return worst


class Sums:
    """Inside, counts the bytes of rows of D numbers that ranks sum."""

    def __init__(self) -> None:
        self.bytes, self._plain = 0, dist.all_reduce

    def __enter__(self) -> "Sums":
        dist.all_reduce = self._count
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._plain

    def _count(self, tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if tensor.dim() == 2 and tensor.shape[1] == SHAPE.d_model:
            self.bytes += tensor.numel() * tensor.itemsize
        return self._plain(tensor, *arguments, **options)


def measured(world: World, cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Of each case: bytes really held, bytes computed, and numbers of parameters really cut and computed."""
    found = []
    for case in cases:
        before, config = alive(), EngineConfig(**case)
        divided = world.divided(config.tensor_parallel)
        torch.manual_seed(0)
        objective = objectives.build({"name": "janus"}, IDS, None, SHAPE)
        module = ObjectiveModule(EncoderDecoder(SHAPE, IDS, config.activation_checkpointing), objective)
        engine = build(config, OptimConfig(), module, divided)
        draw = np.random.default_rng(0)
        batch = objective.collate([objective.corrupt(draw.integers(5, 2000, 30), WHOLE, draw) for _ in range(12)])
        scale = unit_scale(objective, batch)
        engine.accumulate([batch, batch], scale)
        engine.step(1e-3)
        rest, sums = alive() - before, Sums()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile, sums:
            engine.accumulate([batch, batch], scale)
            engine.step(1e-3)
        trace = Path(folder) / f"{world.rank}.json"
        profile.export_chrome_trace(str(trace))
        copied: dict[str, torch.Tensor] = {}
        state.copy(engine, copied)
        with torch.device("meta"):
            shape = EncoderDecoder(SHAPE, IDS)
        how = config.precision, "cpu", config.activation_checkpointing, config.tensor_parallel
        memory = rank_memory(shape, SHAPE, config, world.size, "cpu", activation_bytes(SHAPE, batch, *how))
        found.append(
            {
                "held": rest + highest(trace),
                "copied": sum(tensor.nbytes for tensor in copied.values()),
                "computed": memory.total + sum(memory.host.values()) - memory.host["copy for checkpoints"],
                "computed copy": memory.host["copy for checkpoints"],
                "sizes": [int(np.prod(shape)) for shape in engine._shapes().values()],
                "computed sizes": part_sizes(shape, config.tensor_parallel),
                "summed": sums.bytes,
                "computed sums": tensor_parallel_payload(SHAPE, [batch, batch], config).get(ALL_REDUCE, 0),
            }
        )
        del engine, module, batch, profile, copied
    return found


def compare(cases: list[dict[str, Any]], folder: Path) -> None:
    for case, *ranks in zip(cases, *run_ranks(measured, 2, cases, str(folder), timeout=900), strict=True):
        again = 0.1 if case.get("activation_checkpointing") else 0.0  # torch stops where it has what it needs
        assert max(one["copied"] for one in ranks) == ranks[0]["computed copy"], case
        for one in ranks:
            assert one["computed sizes"] == one["sizes"], case
            assert one["computed sums"] == pytest.approx(one["summed"], rel=again), case
            assert one["computed"] == pytest.approx(one["held"], rel=0.1), case


def test_a_rank_holds_what_was_computed(tmp_path: Path) -> None:
    compare(QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_rank_of_every_kind_holds_what_was_computed(tmp_path: Path) -> None:
    compare(SLOW, tmp_path)

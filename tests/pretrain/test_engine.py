"""Every engine computes the same update, however the global batch is cut, and never applies a non-finite one.

All multi-rank work runs in one job of two ranks and one job of one rank; the tests look at what they returned.
"""

from typing import Any

import numpy as np
import pytest
import torch

from pretrain import distributed
from pretrain.config import EngineConfig
from pretrain.distributed import World
from pretrain.engine import build
from pretrain.engine.deepspeed import derive, merge
from pretrain.errors import ConfigError
from tests.distributed_helper import run_ranks
from tests.pretrain.toy_engine import OPTIM, ToyBatch, toy_engine, toy_module, toy_train, toy_window

FP32 = [("local", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
BF16 = [("local", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
CASES = [(*one, "fp32") for one in FP32] + [(*one, "bf16") for one in BF16]
ALONE = World(0, 1, 0, torch.device("cpu"))
Case = tuple[str, int, str]


def numpy_weights(engine: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in engine.full_weights().items()}


def curves(world: World, kind: str, stage: int, precision: str) -> dict[str, Any]:
    """Six updates with windows of 2 to 6 micro-batches; then one with a NaN on the last rank; then three more."""
    engine = toy_engine(world, kind, stage, precision)
    found: dict[str, Any] = {"start": numpy_weights(engine)}
    found["steps"] = toy_train(engine, range(6))
    found["weights"] = numpy_weights(engine)
    found["poisoned"] = toy_train(engine, range(6, 7), poison=(6, world.size - 1))
    found["after_poison"] = numpy_weights(engine)
    found["later"] = toy_train(engine, range(7, 10))
    with engine.gathered():
        head, shared = engine.module.model.head.weight, engine.module.model.shared.weight
        found["tied"] = head is shared and tuple(head.shape) == (7, 5)
        found["forward"] = head.detach().float().numpy().copy()
    found["rank0_only"] = bool(engine.full_weights()) == (world.rank == 0)
    before = numpy_weights(engine)
    sums = engine.evaluate(toy_window(3)[world.rank :: world.size])
    found["evaluate"] = {name: float(value) for name, value in sums.items()}
    found["training"] = engine.module.training
    found["touched"] = [
        name for name, value in numpy_weights(engine).items() if not np.array_equal(value, before[name])
    ]
    found["updates"] = engine.updates
    found["final"] = numpy_weights(engine)
    return found


def moved_whole(world: World) -> list[str]:
    """What is moved to the device in one piece while ZeRO-3 is set up."""
    found, plain = [], torch.nn.Module.to

    def noted(self: torch.nn.Module, *arguments: Any, **options: Any) -> torch.nn.Module:
        found.append(type(self).__name__)
        return plain(self, *arguments, **options)

    torch.nn.Module.to = noted  # type: ignore[method-assign]
    toy_engine(world, "deepspeed", 3, "bf16")
    torch.nn.Module.to = plain  # type: ignore[method-assign]
    return found


def of_the_users(world: World, **zero: int) -> dict[str, float]:
    """What ZeRO-3 with a DeepSpeed configuration of the user's own makes of weights that are written into it."""
    user = {"train_batch_size": world.size, "zero_optimization": {"stage3_param_persistence_threshold": 0, **zero}}
    engine = build(EngineConfig(zero_stage=3), OPTIM, toy_module(), world, user)
    for name in engine.parameters():
        engine.write(name, {"param": 3 * engine.read(name)["param"] + 0.1})
    engine.refresh()
    return {name: float(value) for name, value in engine.evaluate(toy_window(3)[world.rank :: world.size]).items()}


def two_ranks(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # First, because the first engine of a process sets deepspeed up.
    found["own"] = [of_the_users(world), of_the_users(world, zero_hpz_partition_size=2)]
    found |= {str(case): curves(world, *case) for case in CASES}
    found["summed"] = distributed.sum_counts({"b": world.rank + 0.5, "a": 10 + world.rank})
    found["any"] = [distributed.any_rank(world.rank == 1), distributed.any_rank(False)]
    found["told"] = distributed.broadcast_object({"from": world.rank, "text": "é" * (1 + world.rank)})
    found["moved whole"] = moved_whole(world)
    found["exchanged"] = distributed.exchange("x" * world.rank)
    try:
        distributed.rank_zero(lambda: (_ for _ in ()).throw(ConfigError("only rank 0 saw this")))
    except ConfigError as error:
        found["error"] = str(error)
    return found


def one_rank(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {str(case): curves(world, *case) for case in CASES}
    for offload, stage in (("optimizer", 1), ("optimizer", 2), ("optimizer", 3), ("all", 3)):
        engine = toy_engine(world, "deepspeed", stage, offload=offload)
        found[f"offload {offload} {stage}"] = {"steps": toy_train(engine, range(6)), "weights": numpy_weights(engine)}
    return found


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2)


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return run_ranks(one_rank, 1)[0]


@pytest.fixture(scope="module")
def judge() -> dict[str, Any]:
    """Plain torch on one rank without the engine layer: one backward over the joined window, torch's own AdamW."""
    module = toy_module()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    decayed = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.01, betas=OPTIM.betas
    )
    norms, curve = [], []
    for step in range(6):
        adam.zero_grad()
        ids_n = torch.cat([batch.ids_n for batch in toy_window(step)])
        batch = ToyBatch(ids_n, toy_window(step)[0].rare)
        counts = module.objective.counts(batch)
        total, sums = module(batch, {name: w / counts[name] for name, w in module.objective.weights.items()})
        total.backward()
        if not batch.rare:
            assert module.model.rare.weight.grad is None
            module.model.rare.weight.grad = torch.zeros_like(module.model.rare.weight)
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
        curve.append(float(sums["ce"]))
        adam.step()
    weights = {name: p.detach().numpy() for name, p in module.named_parameters()}
    return {"norms": norms, "ce": curve, "weights": weights, "start": start}


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cut_into_ranks_and_micro_batches_does_not_matter(
    case: Case, pair: list[dict[str, Any]], single: dict[str, Any], judge: dict[str, Any]
) -> None:
    tolerance = 2e-6 if case[2] == "fp32" else 2e-2
    for ranks in ([one[str(case)] for one in pair], [single[str(case)]]):
        np.testing.assert_allclose([step[0] for step in ranks[0]["steps"]], judge["norms"], rtol=tolerance)
        ce = np.sum([[step[2]["ce"] for step in rank["steps"]] for rank in ranks], axis=0)
        np.testing.assert_allclose(ce, judge["ce"], rtol=tolerance)
        close(ranks[0]["weights"], judge["weights"], 10 * tolerance)
        assert all(step[1] for step in ranks[0]["steps"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_nan_on_one_rank_is_never_applied(case: Case, pair: list[dict[str, Any]], single: dict[str, Any]) -> None:
    for found in (pair[0][str(case)], pair[1][str(case)], single[str(case)]):
        norm, applied, _ = found["poisoned"][0]
        assert not applied and not np.isfinite(norm)
        assert found["updates"] == 9
        assert [step[1] for step in found["later"]] == [True] * 3
        for name, value in found["weights"].items():
            assert np.array_equal(value, found["after_poison"][name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engines_agree_after_a_skipped_update(
    precision: str, pair: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    cases = [case for case in CASES if case[2] == precision]
    wanted = single[str(cases[0])]["final"]
    for case in cases:
        close(pair[0][str(case)]["final"], wanted, 2e-5 if precision == "fp32" else 2e-3)
        close(single[str(case)]["final"], wanted, 2e-5 if precision == "fp32" else 2e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_every_engine_promises(case: Case, pair: list[dict[str, Any]], judge: dict[str, Any]) -> None:
    first, second = (one[str(case)] for one in pair)
    for name, value in judge["start"].items():
        assert np.array_equal(first["start"][name], value.numpy()), f"{name} must start unrounded"
    assert set(first["start"]) == {*judge["start"], "model.constant_V"}
    for found in (first, second):
        assert found["tied"] and found["rank0_only"] and found["training"] and not found["touched"]
        assert np.array_equal(found["forward"], first["forward"])
    master = torch.from_numpy(first["final"]["model.shared.weight"])
    rounded = master if case[2] == "fp32" else master.bfloat16().float()
    assert np.array_equal(first["forward"], rounded.numpy())
    assert first["evaluate"]["ce"] > 0


@pytest.mark.parametrize("name", ["offload optimizer 1", "offload optimizer 2", "offload optimizer 3", "offload all 3"])
def test_offload_computes_the_same(name: str, single: dict[str, Any], judge: dict[str, Any]) -> None:
    np.testing.assert_allclose([step[0] for step in single[name]["steps"]], judge["norms"], rtol=2e-6)
    close(single[name]["weights"], judge["weights"], 2e-5)


def test_zero_3_cuts_a_model_before_it_goes_to_the_device(pair: list[dict[str, Any]]) -> None:
    assert pair[0]["moved whole"] == pair[1]["moved whole"] == []


def test_weights_are_those_that_were_written_however_zero_3_keeps_them(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        whole, secondary = rank["own"]
        assert secondary == pytest.approx(whole, rel=1e-6)


def test_what_ranks_tell_each_other(pair: list[dict[str, Any]]) -> None:
    for found in pair:
        assert found["summed"] == {"a": 21, "b": 2.0} and isinstance(found["summed"]["a"], int)
        assert found["any"] == [True, False]
        assert found["told"] == {"from": 0, "text": "é"}
        assert found["exchanged"] == ["", "x"]
        assert found["error"] == "only rank 0 saw this"


def test_without_a_process_group_it_is_a_world_of_one() -> None:
    assert distributed.sum_counts({"a": 2}) == {"a": 2}
    assert distributed.exchange([1, "é"]) == [[1, "é"]]
    assert not distributed.any_rank(False)
    distributed.barrier()


def test_local_in_float64_stays_float64() -> None:
    module = toy_module().double()
    engine = build(EngineConfig(kind="local"), OPTIM, module, ALONE)
    toy_train(engine, range(2))
    assert module.model.shared.weight.dtype == torch.float64
    assert engine.read("model.shared.weight")["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "fp16"}, "`engine.precision` must be fp32 or bf16 on a CPU, got fp16"),
        ({"precision": "bf16", "zero_stage": 0}, "`engine.zero_stage` must be at least 1"),
        ({"kind": "local", "offload": "optimizer"}, "needs `engine.kind` deepspeed"),
        ({"offload": "all", "zero_stage": 2}, "needs `engine.zero_stage` 3, got 2"),
        ({"offload": "optimizer", "zero_stage": 0}, "at least 1, got 0"),
    ],
)
def test_combinations_that_do_not_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(EngineConfig(**values), OPTIM, toy_module(), ALONE)


def test_a_frozen_parameter_is_refused() -> None:
    module = toy_module()
    module.model.norm.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"`model\.norm\.bias` must be trainable"):
        build(EngineConfig(kind="local"), OPTIM, module, ALONE)


def test_a_users_deepspeed_config_is_merged_and_conflicts_are_errors() -> None:
    derived = derive(EngineConfig(zero_stage=2), OPTIM, 1001)
    assert derived["gradient_accumulation_steps"] == 1 and derived["gradient_clipping"] == 0.5
    merged = merge(derived, {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True})
    assert merged["zero_optimization"] == {**derived["zero_optimization"], "overlap_comm": True}
    assert "overlap_comm" not in derived["zero_optimization"]
    with pytest.raises(ConfigError, match=r"deepspeed `zero_optimization\.stage` must be 2 with .*, got 3"):
        merge(derived, {"zero_optimization": {"stage": 3}})

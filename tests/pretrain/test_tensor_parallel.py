"""A model that ranks share computes what one rank does: losses, gradients, updates, what it writes, and its state.

Ranks return what they found, and the tests compare it with the same on one rank in plain torch.
"""

from typing import Any

import numpy as np
import pytest
import torch

from pretrain import objectives, rng
from pretrain.config import EngineConfig, OptimConfig
from pretrain.distributed import World
from pretrain.engine import build
from pretrain.engine.tensor_parallel import check
from pretrain.errors import ConfigError
from pretrain.objectives import ObjectiveModule
from pretrain.watch import cosine
from tests.distributed_helper import run_ranks
from tests.pretrain.objectives.cases import IDS, SHAPE, examples, tiny_model

OPTIM = OptimConfig(lr=0.01, clip=0.5, weight_decay=0.1)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "janus": {"weights": {"kl_ar_nar": 1.0, "length": 0.1}, "label_smoothing": 0.1},
    "cmlm": {},
    "denoise": {},
    "lplm": {"copies": 3, "length_weight": 0.1},
    "lplm separate": {"copies": 3},
    "hard_exit": {"training": "simulated", "threshold": 2.5},
    "soft_exit": {},
    "cmlm_corr": {},
    "rdrop": {"length_weight": 0.1},
}
Case = tuple[str, str, dict[str, Any]]  # objective, precision of the weights, engine
# 37 tokens divide neither by 2 nor by 4; four ranks have one head each
LOCAL: list[Case] = [
    (name, kind, {"kind": "local", "tensor_parallel": degree})
    for degree in (2, 4)
    for kind in ("float64", "float32")
    for name in OBJECTIVES
]
ZERO: list[Case] = [
    (name, "float32", {"zero_stage": stage, "tensor_parallel": 2}) for name in ("janus", "lplm") for stage in range(4)
]
# everything that saves memory at once, and each alone
SAVING: list[Case] = [
    (name, "float32", {"zero_stage": stage, "offload": offload, "activation_checkpointing": again, **degree})
    for name in ("janus", "lplm")
    for stage, offload in ((2, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all"))
    for again in (False, True)
    for degree in ({"tensor_parallel": 2}, {})
    if offload != "none" or again
]
QUICK = [LOCAL[0], LOCAL[3], ZERO[3], ("lplm", "float32", {**SAVING[2][2], "activation_checkpointing": True})]


def module_of(name: str, dtype: torch.dtype, **changes: Any) -> ObjectiveModule:
    kind, *separate = name.split()
    shape = {"soft_exit": kind == "soft_exit", "off_ramps": "separate" if separate else "shared", "heads": 4}
    model = tiny_model(**{**shape, "logits_bias": True, "encoder_layers": 1, **changes}).to(dtype)
    torch.nn.init.normal_(model.head.bias_V)
    objective = objectives.build({"name": kind, **OBJECTIVES[name]}, IDS, None, SHAPE)
    return ObjectiveModule(model, objective)


def window(objective: Any, data_rank: int, data_size: int) -> tuple[list[Any], dict[str, float]]:
    """This rank's micro-batches of three, the last one empty; scale for a mean over all."""
    draw = np.random.default_rng(5)
    given = [objective.corrupt_pair(one.source, one.target, draw) for one in examples()]
    batches = [objective.collate(part) for part in (given[:2], given[2:], [])]
    counts = [objective.counts(batch) for batch in batches]
    total = {name: sum(count[name] for count in counts) for name in objective.weights}
    scale = {name: weight / max(1, total[name]) for name, weight in objective.weights.items()}
    mine = batches[data_rank::data_size]
    return mine + [objective.collate([])] * (-len(batches) % data_size if data_rank else 0), scale


def updates(world: World, name: str, dtype: torch.dtype, config: EngineConfig, steps: int = 2) -> dict[str, Any]:
    """Sums over the data-parallel ranks, norms, and gradients (as the first moment of the first update keeps them)."""
    module = module_of(name, dtype)
    module.model.checkpointing = config.activation_checkpointing
    engine = build(config, OPTIM, module, world)
    batches, scale = window(module.objective, world.data_rank, world.data_size)
    scale = {term: value * engine.loss_factor for term, value in scale.items()}
    found: dict[str, Any] = {"norms": [], "sums": []}
    for step in range(steps):
        sums = engine.accumulate(batches, scale)
        found["sums"].append({term: float(value) for term, value in sums.items()})
        found["norms"].append(engine.step(0.01).grad_norm)
        if not step:
            found["gradients"] = {key: engine.read(key)["exp_avg"].numpy() for key in engine.shapes()}
    found["valid"] = {term: float(value) for term, value in engine.evaluate(batches).items()}
    with engine.gathered(), torch.no_grad():
        module.eval()
        batch = batches[0] if world.data_size == 1 else window(module.objective, 0, 1)[0][0]
        found["previews"] = [one.predicted for one in module.objective.preview(module.model, batch, 2)]
    return found


def several(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    found = []
    for name, kind, engine in cases:
        config = EngineConfig(**engine)
        found.append(updates(world.divided(config.tensor_parallel), name, getattr(torch, kind), config))
    return found


def dropped(world: World) -> dict[str, Any]:
    """What two ranks that share a model draw, and gradients with dropout everywhere, kept and computed again."""
    from pretrain.models.tensor_parallel import own_draws

    world, config = world.divided(2), EngineConfig(kind="local", tensor_parallel=2)
    module = module_of("janus", torch.float64, dropout=0.3, attention_dropout=0.3, activation_dropout=0.3)
    build(config, OPTIM, module, world)
    (batch, *_), scale = window(module.objective, 0, 1)
    found: dict[str, Any] = {"gradients": []}
    for again in (False, True):
        module.model.checkpointing = again
        rng.seed(1, world.data_rank)
        module.zero_grad()
        module(batch, scale)[0].backward()
        found["gradients"].append({key: p.grad.numpy().copy() for key, p in module.named_parameters()})
    found["memory"] = module.model.encode(batch.source).detach().numpy()
    with own_draws(world.tensor_rank, world.device):
        found["own"] = torch.rand(4).numpy()
    found["shared"] = torch.rand(4).numpy()
    return found


def quick(world: World) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return several(world, QUICK), dropped(world)


def judged(name: str, kind: str) -> dict[str, Any]:
    """The same on this rank alone."""
    world = World(0, 1, 0, torch.device("cpu"))
    return updates(world, name, getattr(torch, kind), EngineConfig(kind="local"))


def same(ranks: list[dict[str, Any]], judge: dict[str, Any], degree: int, tolerance: float, where: str) -> None:
    """Sums, norms, gradients and weights of all ranks, in rank order, are those of the judge."""
    firsts = ranks[::degree]
    for step, wanted in enumerate(judge["sums"]):
        largest = max(wanted.values())  # a divergence is a difference of numbers as large as this one
        for term, value in wanted.items():
            found = sum(one["sums"][step][term] for one in firsts)
            assert found == pytest.approx(value, rel=0, abs=tolerance * largest), (where, step, term)
    for rank, one in enumerate(ranks):
        assert one["norms"] == pytest.approx(judge["norms"], rel=10 * tolerance), where
        assert one["sums"] == firsts[rank // degree]["sums"], f"{where}: ranks of a group see the same numbers"
        largest = max(abs(gradient).max() for gradient in judge["gradients"].values())
        for key, gradient in judge["gradients"].items():
            np.testing.assert_allclose(
                one["gradients"][key], gradient, rtol=0, atol=tolerance * largest, err_msg=f"{where} {key}"
            )


def compare(shared: list[list[dict[str, Any]]], cases: list[Case]) -> None:
    for case, ranks in zip(cases, zip(*shared, strict=True), strict=True):
        name, kind, engine = case
        judge = judged(name, kind)
        same(list(ranks), judge, engine.get("tensor_parallel", 1), 1e-12 if kind == "float64" else 1e-6, str(case))
        if kind == "float64":
            assert all(one["previews"] == judge["previews"] for one in ranks), case


@pytest.fixture(scope="module")
def two() -> Any:
    return run_ranks(quick, 2)


def test_two_ranks_that_share_a_model_compute_what_one_does(two: Any) -> None:
    compare([rank[0] for rank in two], QUICK)


def test_ranks_that_share_a_model_drop_the_same_states_and_their_own_attention(two: Any) -> None:
    one, other = (rank[1] for rank in two)
    np.testing.assert_array_equal(one["memory"], other["memory"])
    np.testing.assert_array_equal(one["shared"], other["shared"])
    assert not np.array_equal(one["own"], other["own"])
    for rank in (one, other):
        kept, again = rank["gradients"]
        for key, gradient in kept.items():
            np.testing.assert_allclose(again[key], gradient, rtol=1e-10, atol=1e-14, err_msg=key)


def test_what_cannot_be_cut_is_refused() -> None:
    shape = SHAPE.model_copy(update={"vocab_size": 100, "heads": 4, "ffn_dim": 24})
    check(shape, 4)
    for changes, degree, message in (
        ({}, 3, r"`model\.heads` must be a multiple of `engine\.tensor_parallel` \(3\), got 4"),
        ({"ffn_dim": 30}, 4, r"`model\.ffn_dim` must be a multiple of .* \(4\), got 30"),
        ({"vocab_size": 9, "heads": 8, "ffn_dim": 24}, 8, r"`model\.vocab_size` must give each of 8 ranks a part"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(shape.model_copy(update=changes), degree)
    alone = World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"`engine\.tensor_parallel` must divide the number of ranks \(1\), got 2"):
        alone.divided(2)
    with pytest.raises(ConfigError, match=r"`engine\.tensor_parallel` must be 1 here, got 2"):
        build(EngineConfig(kind="local", tensor_parallel=2), OPTIM, module_of("janus", torch.float64), alone)
    with pytest.raises(ConfigError, match=r"`train\.cosine_every` must be 0 with `engine\.tensor_parallel` above 1"):
        cosine.check(5, EngineConfig(kind="local", tensor_parallel=2), None)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_four_ranks_that_share_models_compute_what_one_does(degree: int, kind: str) -> None:
    cases = [case for case in LOCAL if case[1] == kind and case[2]["tensor_parallel"] == degree]
    compare(run_ranks(several, 4, cases, timeout=900), cases)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world", [2, 4])
def test_every_zero_stage_over_shared_models(world: int) -> None:
    compare(run_ranks(several, world, ZERO, timeout=900), ZERO)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_offload_and_activation_checkpointing_change_no_number() -> None:
    compare(run_ranks(several, 2, SAVING, timeout=900), SAVING)

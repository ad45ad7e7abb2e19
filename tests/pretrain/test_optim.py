"""Learning rates by hand and by property; which parameters decay."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import OptimConfig
from pretrain.optim import adamw, create_state, learning_rate, parameter_groups
from tests.pretrain.toy_engine import OPTIM, toy_module

SCHEDULES = ["inverse_sqrt", "polynomial", "cosine", "constant"]


def rates(total: int = 100, **values: object) -> list[float]:
    config = OptimConfig(**{"lr": 1.0, "warmup": 10, **values})  # type: ignore[arg-type]
    return [learning_rate(step, config, total) for step in range(total)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_full_rate(schedule: str) -> None:
    assert rates(schedule=schedule)[:11] == pytest.approx([*(n / 10 for n in range(1, 11)), 1.0])


def test_values_by_hand() -> None:
    assert rates(schedule="inverse_sqrt")[40] == pytest.approx(0.5)  # 40 updates after the start, 4 warm-ups long
    assert rates(schedule="inverse_sqrt", warmup=0)[3] == pytest.approx(0.5)
    assert rates(schedule="polynomial", end_lr=0.2)[55] == pytest.approx(0.6)
    assert rates(schedule="polynomial", power=2.0)[55] == pytest.approx(0.25)
    assert rates(schedule="cosine", end_lr=0.2)[55] == pytest.approx(0.6)
    assert rates(schedule="cosine")[40] == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    assert rates(schedule="constant")[99] == 1.0
    assert learning_rate(500, OptimConfig(schedule="polynomial", end_lr=0.1), 100) == pytest.approx(0.1)


@given(
    st.sampled_from(SCHEDULES),
    st.integers(0, 50),
    st.integers(1, 100),
    st.floats(0.0, 1e-3),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_after_the_warm_up_it_never_rises_and_stays_in_range(
    schedule: str, warmup: int, total: int, end: float, power: float
) -> None:
    found = rates(total + 20, lr=1e-3, schedule=schedule, warmup=warmup, end_lr=end, power=power)
    assert all(0.0 <= rate <= 1e-3 * (1 + 1e-12) for rate in found)
    later = found[warmup:]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(later))
    assert all(rate >= end * (1 - 1e-9) for rate in later)


def test_biases_norms_and_positions_do_not_decay() -> None:
    module = toy_module()
    module.model.embed_positions = torch.nn.Embedding(3, 5)
    names = {p: name for name, p in module.named_parameters()}
    decayed, spared = parameter_groups(module, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert [names[p] for p in decayed["params"]] == [f"model.{n}.weight" for n in ("shared", "inner", "rare")]
    assert [names[p] for p in spared["params"]] == [
        *(f"model.{n}" for n in ("norm.weight", "norm.bias", "inner.bias", "head.bias", "embed_positions.weight"))
    ]
    assert len(parameter_groups(torch.nn.LayerNorm(3), 0.1)) == 1


def test_state_made_beforehand_changes_no_update() -> None:
    weights = []
    for beforehand in (False, True):
        module = toy_module()
        adam = adamw(parameter_groups(module, 0.1), OPTIM)
        assert adam.param_groups[0]["lr"] == 0.0
        if beforehand:
            create_state(adam, module.parameters())
        for group in adam.param_groups:
            group["lr"] = 0.1
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        adam.step()
        weights.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

"""Batching, de-duplication and the runners' objectives."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune import runners
from finetune.generate import batches, without_repeats
from pretrain.bundles.description import Description, Mode
from pretrain.config import ModelConfig
from pretrain.errors import ConfigError
from pretrain.models.patterns import ArLayout
from pretrain.objectives import Example, ObjectiveModule, build
from tests.finetune.models import IDS, tiny_model


@given(lengths=st.lists(st.integers(2, 300), max_size=60), limit=st.integers(1, 2000))
def test_batches_hold_every_source_once_and_keep_the_limit(lengths: list[int], limit: int) -> None:
    made = list(batches(lengths, limit))
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= limit


def test_dedup() -> None:
    assert without_repeats(np.array([5, 5, 6, 5, 5, 5])).tolist() == [5, 6, 5]
    assert without_repeats(np.array([], np.int64)).tolist() == []


def description(modes: tuple[Mode, ...], layout: ArLayout) -> Description:
    return Description(tiny_model().config, IDS, layout, modes, {"name": "any"})


@pytest.mark.parametrize(
    ("runner", "modes", "tuned", "term", "positions"),
    [
        ("ar", ("ar", "nar"), ("ar",), "ar", 5),
        ("ar", ("causal",), ("causal",), "ar", 6),
        ("nar", ("ar", "nar"), ("nar",), "nar", None),
    ],
)
def test_a_runner_trains_its_mode_alone(
    runner: str, modes: tuple[Mode, ...], tuned: tuple[str, ...], term: str, positions: int | None
) -> None:
    layout = ArLayout("bos_first", 0, IDS) if "ar" in modes else ArLayout.aligned("eos_first", IDS)
    made = runners.build({"name": runner}, description(modes, layout))
    objective = build(made.objective, IDS, None, ModelConfig(length_classes=32))
    assert made.modes == tuned and (runner == "nar" or objective.layout == layout)
    target = np.array([IDS.bos, 7, 8, 9, 10, IDS.eos])
    example = objective.corrupt_pair(target, target, np.random.default_rng(0))
    assert isinstance(example, Example)
    batch = objective.collate([example])
    used = {name: count for name, count in objective.counts(batch).items() if count and name != "length"}
    assert set(used) == {term} and used[term] == (positions or len(example.masked))
    # no row of another pattern is computed
    rows = {"ar": 10 if "ar" in modes else 6, "nar": 6}[runner]
    assert len(batch.rows.tokens_R) == rows
    total, _ = ObjectiveModule(tiny_model(), objective)(batch, objective.weights)
    assert torch.isfinite(total)


def test_bad_runner_options() -> None:
    about = description(("ar", "nar"), ArLayout.aligned("bos_first", IDS))
    with pytest.raises(ConfigError, match=r"`decoding\.beam` must be greater than or equal to 1, got 0"):
        runners.build({"name": "ar", "decoding": {"beam": 0}}, about)
    with pytest.raises(ConfigError, match=r"must be one of ar, nar, .*got 'elmer'"):
        runners.build({"name": "elmer"}, about)

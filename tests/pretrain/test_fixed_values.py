"""What a checkpoint keeps of a configuration, and how that goes before a config.yaml that people can edit."""

from typing import Any

import pytest

from pretrain.config import Section
from pretrain.errors import CheckpointError
from pretrain.runs import edited, fixed_values, with_fixed


class Small(Section):
    seed: int = 1
    runner: dict[str, Any] = {"name": "ar", "smoothing": 0.1, "decoding": {"beam": 4}}
    weights: dict[str, float] | None = None


FIXED, FREE = ("seed", "runner", "weights"), ("runner.decoding",)


def test_what_is_free_is_not_kept_and_stays_as_it_is() -> None:
    kept = fixed_values(Small(), FIXED, FREE)
    assert kept == {"seed": 1, "runner": {"name": "ar", "smoothing": 0.1}, "weights": None}
    other = Small(runner={"name": "nar", "smoothing": 0.2, "decoding": {"beam": 9}}, seed=5, weights={"a": 1.0})
    back = with_fixed(other, kept, FREE)
    assert back == Small(runner={"name": "ar", "smoothing": 0.1, "decoding": {"beam": 9}})
    assert edited(other.model_dump(), kept) == {
        "seed": [1, 5], "runner.name": ["ar", "nar"], "runner.smoothing": [0.1, 0.2], "weights": [None, {"a": 1.0}]
    }  # fmt: skip
    assert edited(Small().model_dump(), kept) == {}


def test_a_source_that_was_added_by_hand_is_taken_out_again() -> None:
    kept = fixed_values(Small(weights={"a": 1.0}), FIXED)
    assert with_fixed(Small(weights={"a": 1.0, "b": 2.0}), kept).weights == {"a": 1.0}


@pytest.mark.parametrize("saved", [None, [], "x"])
def test_an_older_checkpoint_keeps_nothing(saved: object) -> None:
    assert with_fixed(Small(seed=3), saved) == Small(seed=3) and edited({}, saved) == {}


@pytest.mark.parametrize("saved", [{"seed": "many"}, {"nothing": 1}, {"seed.deep": 1}])
def test_what_is_no_configuration_is_a_bad_checkpoint(saved: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        with_fixed(Small(), saved)

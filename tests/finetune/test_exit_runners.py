"""What travels with a bundle tuned for early exit: first row, number of rows, threshold; and what is refused."""

from typing import Any

import numpy as np
import pytest

from finetune import runners
from finetune.decoding import Generated
from finetune.generate import check_mode
from finetune.runners import Runner, with_modes
from pretrain.bundles.description import Description
from pretrain.errors import ConfigError, UsageError
from pretrain.models import EncoderDecoder
from pretrain.models.patterns import ArLayout
from pretrain.objectives import build
from tests.finetune.models import IDS, pack, some_sources, tiny_model

BOTH = pytest.mark.parametrize("name", ["hard_exit", "soft_exit"])


def about(positions: int = 64, **changes: Any) -> Description:
    given = {"modes": ("hard_exit",), "objective": {"name": "lplm"}, **changes}
    config = tiny_model(decoder_layers=3, max_positions=positions).config
    return Description(config, IDS, ArLayout.aligned("bos_first", IDS), **given)


def rows_written(runner: Runner) -> int:
    """Of a model that never ends a text."""
    model = EncoderDecoder(runner.model.model_copy(update={"logits_bias": True}), IDS, backend="torch").eval()
    assert model.head.bias_V is not None
    model.head.bias_V.data[IDS.eos] = -1e4
    made: Generated = runner.generate(model, pack(some_sources()[:1]))
    return len(made.tokens[0])


def rows_tuned(runner: Runner) -> int:
    """Decoder rows of one short text in training."""
    objective = build(runner.objective, IDS, None, runner.model)
    target = np.array([IDS.bos, 7, 8, IDS.eos])
    batch = objective.collate([objective.corrupt_pair(target, target, np.random.default_rng(0))])
    return len(batch.target_L)


@BOTH
@pytest.mark.parametrize(("options", "positions", "rows"), [({}, 64, 63), ({"rows": 20}, 64, 20), ({}, 32, 31)])
def test_as_many_rows_are_written_as_were_tuned(name: str, options: dict[str, Any], positions: int, rows: int) -> None:
    start = about(positions)
    tuned = runners.build({"name": name, **options}, start)
    bundle = with_modes(start, tuned)
    assert rows_tuned(tuned) == rows == rows_written(runners.build({"name": name}, bundle))
    assert rows_written(tuned) == rows


@BOTH
def test_rows_of_generation_do_not_change_training(name: str) -> None:
    runner = runners.build({"name": name, "decoding": {"max_length": 9}}, about())
    assert runner.objective["rows"] == 63 and rows_written(runner) == 8
    assert rows_written(runners.build({"name": name}, with_modes(about(), runner))) == 63


@BOTH
def test_what_pre_training_had_travels_presets_too(name: str) -> None:
    for objective, first in (({"preset": "released"}, "bos"), ({}, "mask"), ({"first_row": "bos"}, "bos")):
        start = about(objective={"name": "lplm", **objective})
        tuned = runners.build({"name": name}, start)
        later = runners.build({"name": name}, with_modes(start, tuned))
        assert tuned.objective["first_row"] == later.objective["first_row"] == later.first_row == first
    assert runners.build({"name": name}, about(objective={"name": "other"})).objective["first_row"] == "mask"
    assert rows_written(runners.build({"name": name}, about(objective={"name": "lplm", "rows": 17}))) == 17


@BOTH
def test_rows_beyond_the_positions(name: str) -> None:
    with pytest.raises(ConfigError, match=r"`runner\.rows` must be at most 31, the bundle's 32 .*, got 63"):
        runners.build({"name": name, "rows": 63}, about(32))
    assert rows_written(runners.build({"name": name, "rows": 31}, about(32))) == 31


def test_the_threshold_travels_with_the_bundle() -> None:
    tuned = runners.build({"name": "hard_exit", "threshold": 1.5}, about())
    bundle = with_modes(about(), tuned)
    later = runners.build({"name": "hard_exit"}, bundle)
    assert tuned.decoding.threshold == later.decoding.threshold == 1.5
    for own in (0.0, 0.2):
        assert runners.build({"name": "hard_exit", "decoding": {"threshold": own}}, bundle).decoding.threshold == own
    assert runners.build({"name": "hard_exit"}, about()).decoding.threshold == 0.5


def test_rows_that_tell_the_length_are_not_tuned_unless_it_is_predicted() -> None:
    with pytest.raises(ConfigError, match=r"`runner\.rows` must be a number or `longest` with soft_exit, got `target`"):
        runners.build({"name": "soft_exit", "rows": "target"}, about(length_trained=True))
    for options in ({}, {"length_weight": 0.1}, {"decoding": {"rows": "predicted"}}):
        with pytest.raises(ConfigError, match=r"`runner\.rows` must be a number or .*, got `target` with") as error:
            runners.build({"name": "hard_exit", "rows": "target", **options}, about(length_trained=True))
        assert "\n" not in str(error.value)
    options = {"rows": "target", "length_weight": 0.1, "decoding": {"rows": "predicted"}}
    runner = runners.build({"name": "hard_exit", **options}, about())
    assert runner.objective["rows"] == "target" and runner.decoding.max_length == 64
    assert runners.build({"name": "soft_exit", "rows": "longest"}, about()).objective["rows"] == "longest"


PREDICTED = {"rows": "predicted"}
TARGET = {"name": "hard_exit", "rows": "target"}
RELEASED = {"name": "lplm", "preset": "released"}


@pytest.mark.parametrize(
    ("mode", "objective", "length_trained", "options", "refusal"),
    [
        ("hard_exit", {"name": "lplm"}, False, {}, "tune the bundle first"),
        ("hard_exit", {"name": "lplm"}, False, PREDICTED, "tune the bundle first"),
        ("hard_exit", {"name": "lplm"}, True, {}, "`--rows` must be predicted"),
        ("hard_exit", {"name": "lplm"}, True, PREDICTED, ""),
        ("hard_exit", {"name": "lplm", "rows": 40}, False, {}, ""),
        ("hard_exit", RELEASED, False, {}, ""),
        ("hard_exit", TARGET, True, {"rows": "fixed"}, "`--rows` must be predicted"),
        ("hard_exit", TARGET, True, PREDICTED, ""),
        ("hard_exit", TARGET, False, {}, "`runner.name=hard_exit`"),
        ("hard_exit", {**TARGET, "rows": 63}, False, {}, ""),
        ("soft_exit", {"name": "soft_exit"}, True, {}, "`runner.name=soft_exit`"),
        ("soft_exit", {"name": "soft_exit", "rows": 63}, False, {}, ""),
    ],
)
def test_a_bundle_that_was_told_the_length_does_not_write_without_it(
    mode: Any, objective: dict[str, Any], length_trained: bool, options: dict[str, Any], refusal: str
) -> None:
    description = about(objective=objective, modes=(mode,), length_trained=length_trained)
    if not refusal:
        check_mode(description, "some/bundle", mode, options)
        return
    with pytest.raises(UsageError, match="`some/bundle` took the length of each text") as error:
        check_mode(description, "some/bundle", mode, options)
    assert refusal in str(error.value) and "\n" not in str(error.value)

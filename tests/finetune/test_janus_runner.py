"""The whole JANUS loss on pairs, and the three trainings of runner `nar`: what is trained, and how it then writes."""

from typing import Any, cast

import numpy as np
import pytest
import torch

from finetune import runners
from finetune.runners.nar import Nar
from pretrain.bundles.description import Description, Mode
from pretrain.errors import ConfigError
from pretrain.models.patterns import ArLayout, Layout
from pretrain.objectives import Example, build, janus_reference
from tests.finetune.models import IDS, pack, some_sources, tiny_model

MODEL = tiny_model(dropout=0.0, attention_dropout=0.0)


def about(layout: Layout = "bos_first", offset: int = 1, modes: tuple[Mode, ...] = ("causal",)) -> Description:
    return Description(MODEL.config, IDS, ArLayout(layout, offset, IDS), modes, {})


def some_pairs(objective: Any, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    both = zip(some_sources(), some_sources(seed=1), strict=True)
    return [objective.corrupt_pair(source, target, rng) for source, target in both]


def gradients(losses: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
    total, sums = losses()
    return total.detach(), sums, list(torch.autograd.grad(total, list(MODEL.parameters())))


@pytest.mark.parametrize(("layout", "offset"), [("bos_first", 1), ("bos_first", 0), ("eos_first", 0)])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_its_losses_are_those_of_pre_training(layout: Layout, offset: int, preset: str) -> None:
    """On the same rows: the objective of pre-training, and its plain reference; each with the bundle's layout."""
    runner = runners.build({"name": "janus", "preset": preset}, about(layout, offset))
    tuned = build(runner.objective, IDS, None, runner.model)
    before = build(
        {"name": "janus", "preset": preset, "ar_layout": layout, "ar_query_position_offset": offset,
         "label_smoothing": 0.1, "weights": {"length": 0.1}},
        IDS, None, MODEL.config,
    )  # fmt: skip
    assert tuned.weights == before.weights and tuned.weights["length"] == 0.1
    given = some_pairs(tuned)
    assert all(np.array_equal(a.masked, b.masked) for a, b in zip(given, some_pairs(before), strict=True))
    batch = tuned.collate(given)
    scale = {name: weight / max(1, tuned.counts(batch)[name]) for name, weight in tuned.weights.items()}
    ours = gradients(lambda: tuned.losses(MODEL, batch, scale))
    theirs = gradients(lambda: before.losses(MODEL, before.collate(given), scale))
    plain = gradients(lambda: janus_reference.losses(MODEL, given, tuned.layout, scale, 0.1))
    assert torch.equal(ours[0], theirs[0]) and all(torch.equal(ours[1][name], theirs[1][name]) for name in ours[1])
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-10, atol=0)
    for name, value in plain[1].items():
        torch.testing.assert_close(ours[1][name], value.detach(), rtol=1e-10, atol=1e-12)
    for one, other in zip(ours[2], plain[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_the_released_preset_is_the_translation_code() -> None:
    tuned = runners.build({"name": "janus", "preset": "released"}, about(offset=0)).objective
    released = build({"name": "janus", "preset": "released"}, IDS, None, MODEL.config)
    assert build(tuned, IDS, None, MODEL.config).weights == released.weights
    assert (tuned["share_encoder"], tuned["label_smoothing"], tuned["pair_ratio"]) == (False, 0.1, 0.7)
    given = {"name": "janus", "preset": "released", "weights": {"aux": 0.0}}
    mixed = runners.build(given, about()).objective["weights"]
    assert (mixed["aux"], mixed["kl_ar_aux"], mixed["length"]) == (0.0, 3.0, 0.1)


def test_the_length_is_always_trained() -> None:
    with pytest.raises(ConfigError, match=r"`weights\.length` must be greater than 0, got 0\.0"):
        runners.build({"name": "janus", "weights": {"length": 0.0}}, about())


def test_it_writes_as_the_runners_of_one_way_would() -> None:
    """From the bundle that it tunes: AR from the query stream, whatever stream the bundle had before."""
    decoding = {"ar": {"beam": 2, "max_length": 9}, "nar": {"iterations": 2, "max_length": 9}}
    runner = runners.build({"name": "janus", "decoding": decoding}, about())
    tuned = runners.with_modes(about(), runner)
    assert tuned.modes == ("ar", "nar") and tuned.layout == about().layout
    ways = runners.ways("janus", runner)
    assert list(ways) == ["ar", "nar"] and list(runners.ways("ar", ways["ar"])) == ["ar"]
    source = pack(some_sources())
    for mode, way in ways.items():
        alone = runners.build({"name": mode, "decoding": decoding[mode]}, tuned)
        made, expected = way.generate(MODEL, source), alone.generate(MODEL, source)
        assert [x.tolist() for x in made.tokens] == [x.tolist() for x in expected.tokens]
    content = runners.build({"name": "ar", "decoding": decoding["ar"]}, about()).generate(MODEL, source)
    assert [x.tolist() for x in content.tokens] != [x.tolist() for x in ways["ar"].generate(MODEL, source).tokens]


@pytest.mark.parametrize("training", ["cmlm", "cmlm_corr", "rdrop"])
def test_a_bundle_is_written_from_as_it_was_tuned(training: str) -> None:
    runner = cast(Nar, runners.build({"name": "nar", "training": training}, about()))
    objective = build(runner.objective, IDS, None, runner.model)
    assert runner.objective["name"] == training and runner.objective["label_smoothing"] == 0.1
    assert objective.weights["length"] == 0.1 and tuple(objective.modes) == runner.modes == ("nar",)
    tuned = runners.with_modes(about(), runner)
    rewrite = "all" if training == "cmlm_corr" else "hidden"
    later = cast(Nar, runners.build({"name": "nar", "decoding": {}}, tuned))
    assert runner.decoding.rewrite == later.decoding.rewrite == rewrite
    # Tuned anew in another way it writes in that way; and who asks for a way gets it.
    assert cast(Nar, runners.build({"name": "nar", "training": "cmlm"}, tuned)).decoding.rewrite == "hidden"
    for own in ("hidden", "all"):
        asked = runners.build({"name": "nar", "decoding": {"rewrite": own}}, tuned)
        assert cast(Nar, asked).decoding.rewrite == own

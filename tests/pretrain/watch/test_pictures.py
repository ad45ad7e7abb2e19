"""What people see: mask pictures, and the cosine of two gradients that training must not notice."""

import math

import numpy as np
import pytest
import torch

from pretrain import objectives
from pretrain.config import EngineConfig, OptimConfig, TrainConfig
from pretrain.distributed import World
from pretrain.engine import build
from pretrain.errors import ConfigError
from pretrain.objectives import ObjectiveModule
from pretrain.watch import pictures
from pretrain.watch.cosine import GradientCosine, check
from pretrain.watch.pictures import CELL, COLOURS, INK, WHITE, mask_pictures
from tests.distributed_helper import run_ranks
from tests.pretrain.objectives.cases import IDS, SHAPE, examples, fitted, tiny_model, unit_scale
from tests.pretrain.test_hooks import report

CPU = World(0, 1, 0, torch.device("cpu"))


def objective_of(name, **options):
    return objectives.build({"name": name, **options}, IDS, None, SHAPE)


def read_back(image, colours, rows, keys):
    """bool [rows, keys] of a picture whose first cell is found by its colour."""
    hit = np.zeros(image.shape[:2], bool)
    for colour in colours:
        hit |= (image == colour).all(axis=2)
    columns = np.flatnonzero(hit[CELL * 3 :].sum(axis=0) >= CELL - 1)
    left = next(int(x) for x in columns if x > 5)  # behind the bands at the edge
    top = next(int(y) for y in np.flatnonzero(hit[:, left]) if y > 5)
    centre = CELL // 2 - 1
    return hit[top + centre : top + CELL * rows : CELL, left + centre : left + CELL * keys : CELL]


@pytest.mark.parametrize("name", ["janus", "cmlm", "denoise", "lplm", "hard_exit", "soft_exit"])
def test_the_picture_is_the_mask(name):
    objective = objective_of(name)
    batch = objective.collate(fitted(objective, examples(sizes=((4, 5, 2),))))
    drawn = mask_pictures(batch, IDS, lambda ids: f"w{ids[0]}")
    for image in drawn.values():
        assert image.dtype == np.uint8 and image.shape[2] == 3
    mask = batch.rows.self_mask.materialise().numpy()
    found = read_back(drawn["decoder"], list(COLOURS.values())[1:], *mask.shape)
    assert np.array_equal(found, mask)
    source = batch.source.mask.materialise().numpy()
    assert np.array_equal(read_back(drawn["encoder"], [COLOURS["source"]], *source.shape), source)


def test_janus_shows_every_kind_of_key_and_an_empty_query_has_a_band():
    batch = objective_of("janus").collate(examples(sizes=((4, 5, 2),)))
    image = mask_pictures(batch, IDS, str)["decoder"]
    shown = {tuple(colour) for colour in np.unique(image.reshape(-1, 3), axis=0)}
    assert {*COLOURS.values(), INK, WHITE} <= shown
    small = mask_pictures(objective_of("denoise").collate(examples(sizes=((4, 5, 2),))), IDS, str)["decoder"]
    assert small.shape[0] < image.shape[0] and small.shape[1] < image.shape[1]


def test_labels_say_what_every_row_is_reads_and_predicts(monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "_draw", lambda rows, blocks, predicted: drawn.append((rows, blocks, predicted)))
    batch = objective_of("janus").collate(examples(sizes=((4, 5, 2),)))
    mask_pictures(batch, IDS, lambda ids: f"w{ids[0]}")
    (memory, _, nothing), (rows, ((keys, _), (source, _)), predicted) = drawn
    assert memory == source and set(memory.names) == {"source"} and nothing == {}
    count = len(keys.names)
    assert keys.names == rows.names[:count] and keys.tokens == rows.tokens[:count] and len(rows.names) > count
    for name, token, number in zip(rows.names, rows.tokens, batch.rows.tokens_R.tolist(), strict=True):
        special = {IDS.mask: "[M]", IDS.bos: "<s>", IDS.eos: "</s>"}
        assert token == special.get(number, f"w{number}")
        assert (token == "[M]") == (name == "MASK" or name.endswith("query"))
    assert {rows.names[row] for row in predicted} == {"MASK", "AR query", "AUX query"}
    targets = dict(zip(batch.rows.out_L.tolist(), batch.target_L.tolist(), strict=True))
    assert {row: text.removeprefix("w") for row, text in predicted.items()} == {
        row: {IDS.eos: "</s>"}.get(number, str(number)) for row, number in targets.items()
    }


@pytest.mark.parametrize("text", ["", "日本語", "two\nlines", "x" * 500, "\x00\u202e\ufffd"])
def test_any_token_can_be_a_label(text):
    batch = objective_of("janus").collate(examples(sizes=((4, 5, 2),)))
    usual = mask_pictures(batch, IDS, str)["decoder"]
    image = mask_pictures(batch, IDS, lambda ids: text)["decoder"]
    assert image.dtype == np.uint8 and image.shape[1] < 2 * usual.shape[1], "long ones are cut"


class Board:
    def __init__(self):
        self.values = []

    def scalars(self, step, values):
        self.values.append((step, values))


def engine_of(world, kind="local", stage=0, precision="fp32"):
    model = tiny_model(dropout=0.2).float()
    config = EngineConfig(kind=kind, zero_stage=stage, precision=precision)
    return build(config, OptimConfig(lr=0.01), ObjectiveModule(model, objective_of("janus")), world)


def test_the_cosine_is_that_of_the_two_gradients():
    engine = engine_of(CPU)
    objective, batch = engine.module.objective, engine.module.objective.collate(examples())
    engine.module.eval()
    gradients = []
    for term in ("ar", "nar"):
        engine.module.zero_grad()
        scale = dict.fromkeys(objective.weights, 0.0) | {term: 1.0}
        engine.module(batch, scale)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in engine.module.parameters()]))
    engine.module.zero_grad()
    expected = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    hook = GradientCosine(engine, batch, 2, Board())
    assert hook.measure() == pytest.approx(expected, rel=1e-4) and -1 < expected < 1
    assert hook.measure(loss_scale=1024.0) == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is None for p in engine.module.parameters()) and engine.module.training
    hook.after_step(report(1))
    hook.after_step(report(2))
    assert hook.board.values == [(2, {"train/cosine_ar_nar": pytest.approx(expected, rel=1e-4)})]
    nothing = objective.collate(examples(sizes=((5, 7, 0),)))
    assert math.isnan(GradientCosine(engine, nothing, 1, None).measure()), "no NAR loss, no direction"
    silent = GradientCosine(engine, nothing, 1, Board())
    silent.after_step(report(1))
    assert silent.board.values == []


def trained(world, kind, stage, precision, watched):
    engine = engine_of(world, kind, stage, precision)
    objective = engine.module.objective
    batches = [objective.collate(examples(seed)) for seed in range(3)]
    hook = GradientCosine(engine, batches[2], 1, Board() if watched and world.rank == 0 else None)
    torch.manual_seed(7)
    for step in range(1, 4):
        engine.accumulate(batches[:2], unit_scale(objective, batches[0]))
        hook.after_step(report(step))  # in the middle of nothing a hook ever meets: gradients are there
        engine.step(0.01)
        hook.after_step(report(step))
    seen = len(hook.board.values) if hook.board else 0
    return {name: value.numpy() for name, value in engine.full_weights().items()}, seen


def both(world, *options):
    return trained(world, *options, watched=False), trained(world, *options, watched=True)


def assert_unnoticed(plain, watched):
    assert watched[1] == 6 and plain[1] == 0
    assert all(np.array_equal(plain[0][name], watched[0][name]) for name in plain[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_does_not_notice_the_cosine(precision):
    assert_unnoticed(*both(CPU, "local", 0, precision))


def all_stages(world):
    return {stage: both(world, "deepspeed", stage, "fp32") for stage in (0, 1, 2)}


def test_nor_does_any_stage_of_zero():
    found = run_ranks(all_stages, 2)[0]
    for stage in (0, 1, 2):
        assert_unnoticed(*found[stage])


@pytest.mark.parametrize(
    ("engine", "name", "message"),
    [
        ({"zero_stage": 3}, "janus", "`train.cosine_every` must be 0 with `engine.zero_stage` 3"),
        ({"kind": "local"}, "denoise", "without the terms ar and nar, the objective has ar, length"),
        ({"kind": "local"}, "cmlm", "the objective has nar, length"),
    ],
)
def test_a_cosine_that_cannot_be_had_is_refused(engine, name, message):
    every = TrainConfig(cosine_every=5).cosine_every
    with pytest.raises(ConfigError, match=message):
        check(every, EngineConfig(**engine), objective_of(name))
    check(0, EngineConfig(**engine), objective_of(name))
    check(every, EngineConfig(kind="local", zero_stage=3), objective_of("janus"))

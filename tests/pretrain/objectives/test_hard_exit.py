"""Hard exit: both ways of training equal plain ones; the exits are those that writing would choose."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.cost.flops import batch_flops
from pretrain.errors import ConfigError
from pretrain.models import reference
from pretrain.models.early_exit import ExitRule, ParallelRows, plan_exits
from pretrain.objectives import build, lplm_reference
from pretrain.objectives.janus_reference import cross_entropy
from pretrain.objectives.lplm import ExitExample
from tests.pretrain.objectives.cases import IDS, examples, loss_and_gradients, tiny_model, unit_scale

LAYERS = 4


def shape(**changes):
    return tiny_model(**{"decoder_layers": LAYERS, "init_std": 0.5, **changes})


def objective(model, name="hard_exit", **options):
    return build({"name": name, **options}, IDS, None, model.config)


def texts(seed=0):
    return [ExitExample(e.source, e.target, e.masked, np.empty((1, 0), np.int64)) for e in examples(seed)]


def exits_of(model, hard, given):
    batch = hard.collate(given)
    lengths = [len(e.target) - 1 for e in given]
    with torch.no_grad():
        rows = ParallelRows.pack(model, lengths, batch.source, hard.options.first_row)
        found = plan_exits(model, rows, model.encode(batch.source), ExitRule(hard.options.threshold))
    return np.split(found, np.cumsum(lengths)[:-1])


def compare_simulated(model, given, **options):
    hard = objective(model, training="simulated", **options)
    same = {key: options[key] for key in ("first_row", "label_smoothing", "length_weight") if key in options}
    lplm = objective(model, "lplm", copies=1, detach_copied_state=hard.options.detach_copied_state, **same)
    found = exits_of(model, hard, given)
    given = [ExitExample(e.source, e.target, e.masked, x[None]) for e, x in zip(given, found, strict=True)]
    batch = hard.collate(given)
    scale = unit_scale(hard, batch)
    ours = loss_and_gradients(model, lambda: hard.losses(model, batch, scale))
    plain_scale = {"lplm": scale["hard_exit"], "length": scale["length"]}
    plain = loss_and_gradients(model, lambda: lplm_reference.losses(model, given, lplm, plain_scale))
    ours.assert_equal(plain, {"hard_exit": "lplm", "length": "length"})
    return np.concatenate(found)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_simulated_is_lplm_with_the_exits_that_the_model_chooses(norm, detach):
    model = shape(norm=norm, logits_bias=detach)
    options = {"threshold": 1.9, "label_smoothing": 0.1, "length_weight": 0.3, "first_row": "bos" if detach else "mask"}
    found = compare_simulated(model, texts(), detach_copied_state=detach, **options)
    assert norm == "pre" or len(set(found.tolist())) >= 3


@given(st.integers(0, 10_000), st.floats(0.0, 4.0), st.booleans())
def test_any_threshold(seed, threshold, detach):
    compare_simulated(shape(seed=seed), texts(seed), threshold=threshold, detach_copied_state=detach)


def all_reference(model, given, hard, scale):
    """Every off-ramp on every token, from padded batches."""
    source = reference.pad([torch.from_numpy(e.source) for e in given], IDS.pad)
    real = reference.pad([torch.ones(len(e.source), dtype=torch.int64) for e in given], 0).bool()
    memory = reference.encode(model, source, torch.arange(source.shape[1]).expand_as(source), real)
    n = torch.tensor([len(e.target) - 1 for e in given])
    rows = hard.options.rows
    shown = (
        torch.full_like(n, rows).maximum(n)
        if isinstance(rows, int)
        else n
        if rows == "target"
        else n.max().expand(len(n))
    )
    places = torch.arange(int(shown.max())).expand(len(given), -1)
    x = reference.embed(model, model.decoder, torch.full_like(places, IDS.mask), places)
    visible = (places < shown[:, None])[:, None, :].expand(-1, places.shape[1], -1)
    loss = torch.zeros(())
    for number, layer in enumerate(model.decoder.layers, start=1):
        y = layer.self_attn_layer_norm(x) if layer.pre_norm else x
        x = reference.decoder_layer(layer, x, y, visible, memory, real)
        logits = model.ramp(number)(model.decoder.layer_norm(x))
        for b, e in enumerate(given):
            target = torch.from_numpy(e.target[1:])
            loss = loss + cross_entropy(logits[b, : len(target)], target, hard.options.label_smoothing)
    classes = torch.tensor([len(e.target) for e in given])
    length = torch.nn.functional.cross_entropy(reference.length_logits(model, memory, real), classes, reduction="sum")
    sums = {"hard_exit": loss, "length": length}
    total = sum(scale[name] * value for name, value in sums.items())
    return total, {name: value.detach() for name, value in sums.items()}


@pytest.mark.parametrize("rows", ["target", "longest", 8])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_all_is_every_off_ramp_on_every_token(norm, rows):
    model, given = shape(norm=norm, off_ramps="separate" if rows == 8 else "shared"), examples()
    for ramp in model.ramps:
        ramp.weight.data.add_(torch.randn_like(ramp.weight))
    hard = objective(model, rows=rows, label_smoothing=0.1, length_weight=0.3)
    batch = hard.collate(given)
    scale = unit_scale(hard, batch)
    ours = loss_and_gradients(model, lambda: hard.losses(model, batch, scale))
    plain = loss_and_gradients(model, lambda: all_reference(model, given, hard, scale))
    ours.assert_equal(plain, {"hard_exit": "hard_exit", "length": "length"})
    tokens = sum(len(e.target) - 1 for e in given)
    assert hard.counts(batch) == {"hard_exit": LAYERS * tokens, "length": len(given)}
    vocabulary, width, classes = model.config.vocab_size, model.config.d_model, model.config.length_classes
    projected = LAYERS * tokens * vocabulary + len(given) * classes
    assert batch_flops(model.config, batch).heads == 2 * width * projected


def test_rows_behind_a_target_are_read_and_not_trained():
    model, given = shape(), examples()
    for training in ("all", "simulated"):
        few, more = (objective(model, training=training, rows=rows, threshold=1.9) for rows in ("target", 20))

        def loss(hard, given, model=model):
            return float(hard.losses(model, hard.collate(given), {"hard_exit": 1.0, "length": 0.0})[0].detach())

        assert loss(few, given) != pytest.approx(loss(more, given))
        assert few.counts(few.collate(given)) == more.counts(more.collate(given))
        assert sum(loss(more, [e]) for e in given) == pytest.approx(loss(more, given), rel=1e-10)


@pytest.mark.parametrize("training", ["all", "simulated"])
def test_an_empty_micro_batch_runs_every_module_and_adds_nothing(training):
    model = shape()
    hard = objective(model, training=training, length_weight=0.1)

    def called(given):
        calls = []
        hooks = [
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
            for name, module in model.named_modules()
        ]
        batch = hard.collate(given)
        total, sums = hard.losses(model, batch, unit_scale(hard, batch))
        for hook in hooks:
            hook.remove()
        return total, sums, calls

    model.zero_grad()
    total, sums, calls = called([])
    total.backward()
    assert float(total.detach()) == 0 and not any(float(value) for value in sums.values())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert calls == called(examples())[2]  # ZeRO-3 gathers a module's weights on all ranks when it runs


def test_exits_are_decided_without_dropout():
    model = shape(dropout=0.5)
    model.train()
    hard = objective(model, training="simulated", threshold=1.9)
    batch = hard.collate(examples())
    seen = []
    model.decoder.layers[0].dropout.register_forward_hook(lambda module, *_: seen.append(module.training))
    hard.losses(model, batch, unit_scale(hard, batch))
    assert seen == [False] * 3 + [True] * 3 and model.training


def test_preview_writes_as_the_decoder_does():
    model, given = shape(), examples()
    hard = objective(model, threshold=math.log(37) + 0.1)
    found = hard.preview(model, hard.collate(given), 2)
    assert [preview.target for preview in found] == [e.target.tolist() for e in given[:2]]
    assert {len(preview.predicted["hard_exit"]) for preview in found} == {len(e.target) for e in given[:2]}
    assert [preview.predicted["hard_exit"] for preview in found] != [p.predicted["last_layer"] for p in found]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.5}, "`threshold` must be greater than or equal to 0, got -0.5"),
        ({"threshold": math.nan}, "`threshold` must be a finite number"),
        ({"training": "some"}, "`training` must be 'all' or 'simulated', got 'some'"),
        ({"rows": 0}, "rows"),
        ({"rows": 65}, "`rows` must be at most the model's 64 positions, got 65"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        objective(tiny_model(), **options)
    assert "\n" not in str(error.value)

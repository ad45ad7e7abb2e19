"""Soft exit: packed rows equal a plain padded loop; what is given is given; neighbours in a batch change nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pretrain.errors import ConfigError
from pretrain.models import reference
from pretrain.models.soft_exit import decode_soft
from pretrain.objectives import build
from pretrain.objectives.janus_reference import cross_entropy
from pretrain.objectives.soft_exit import GivenExample
from tests.pretrain.objectives.cases import IDS, VOCAB, loss_and_gradients, tiny_model, unit_scale

LAYERS = 3


def soft_model(**changes):
    return tiny_model(decoder_layers=LAYERS, soft_exit=True, **changes)


def draw(seed=0, sizes=((5, 7), (3, 1), (8, 4), (1, 0))):
    rng = np.random.default_rng(seed)
    made = []
    for source, n in sizes:
        text = [np.concatenate([[IDS.bos], rng.integers(5, VOCAB, k), [IDS.eos]]) for k in (source, n)]
        made.append(GivenExample(*text, np.empty(0, np.int64), rng.random((LAYERS - 1, n + 1)) < 0.4))
    return made


def plain_losses(model, examples, soft, scale):
    """One sample at a time, all logits at once, the loop as the paper has it."""
    total, sums = torch.zeros(()), dict.fromkeys(soft.weights, torch.zeros(()))
    for example in examples:
        source = torch.from_numpy(example.source)[None]
        real = torch.ones_like(source).bool()
        memory = reference.encode(model, source, torch.arange(source.shape[1])[None], real)
        target = torch.from_numpy(example.target[1:])
        n = len(target) if soft.options.rows == "target" else soft.options.rows
        tokens = torch.full((1, n), IDS.mask)
        x = reference.embed(model, model.decoder, tokens, torch.arange(n)[None])
        visible = torch.ones(1, n, n).bool()
        for number, layer in enumerate(model.decoder.layers):
            keys = layer.self_attn_layer_norm(x) if layer.pre_norm else x
            x = reference.decoder_layer(layer, x, keys, visible, memory, real)
            logits = model.ramp(number + 1)(model.decoder.layer_norm(x))[0]
            term = cross_entropy(logits[: len(target)], target, soft.options.label_smoothing)
            sums[f"exit_{number + 1}"] = sums[f"exit_{number + 1}"] + term
            if number + 1 < LAYERS:
                fed = logits.argmax(dim=1)
                given = torch.from_numpy(example.given[number])
                fed[: len(target)] = torch.where(given, target, fed[: len(target)])
                fed_D = (model.shared(fed) * model.scale)[None]
                x = F.linear(torch.cat([x, fed_D], dim=2), model.feedback.weight)
        length = reference.length_logits(model, memory, real)
        sums["length"] = sums["length"] + torch.nn.functional.cross_entropy(length, torch.tensor([len(target) + 1]))
    for name, value in sums.items():
        total = total + scale[name] * value
    return total, {name: value.detach() for name, value in sums.items()}


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(("rows", "ramps"), [("target", "shared"), (9, "separate")])
def test_packed_equals_the_plain_loop(norm, rows, ramps):
    model = soft_model(norm=norm, embed_scale=norm == "pre", logits_bias=True, off_ramps=ramps)
    for ramp in model.ramps:
        ramp.weight.data.add_(torch.randn_like(ramp.weight))
    soft = build(
        {"name": "soft_exit", "rows": rows, "label_smoothing": 0.1, "length_weight": 0.2}, IDS, None, model.config
    )
    examples = draw()
    batch = soft.collate(examples)
    scale = unit_scale(soft, batch)
    ours = loss_and_gradients(model, lambda: soft.losses(model, batch, scale))
    plain = loss_and_gradients(model, lambda: plain_losses(model, examples, soft, scale))
    ours.assert_equal(plain)


def test_neighbours_in_a_batch_change_nothing():
    model, examples = soft_model(), draw()
    soft = build({"name": "soft_exit"}, IDS, None, model.config)

    def states(given):
        batch = soft.collate(given)
        with torch.no_grad():
            every = decode_soft(model, batch.rows, model.encode(batch.source), batch.target_L, batch.given_BR)
        return torch.stack(every).split([len(e.target) - 1 for e in given], 1)

    together = states(examples)
    for index, example in enumerate(examples):
        torch.testing.assert_close(states([example])[0], together[index], rtol=1e-12, atol=1e-12)


def test_an_empty_micro_batch_runs_every_module_and_adds_nothing():
    model = soft_model()
    soft = build({"name": "soft_exit", "length_weight": 0.1}, IDS, None, model.config)
    batch = soft.collate([])
    total, sums = soft.losses(model, batch, unit_scale(soft, batch))
    total.backward()
    assert float(total.detach()) == 0 and not any(float(value) for value in sums.values())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_share_that_is_given():
    model, rng = soft_model(), np.random.default_rng(0)
    target = np.arange(5, 35)
    for preset, share in (("paper", 0.0), ("released", 0.3)):
        soft = build({"name": "soft_exit", "preset": preset}, IDS, None, model.config)
        given = np.stack([soft.corrupt_pair(target, target, rng).given for _ in range(300)])
        assert abs(given.mean() - share) < 0.01 and given.shape == (300, LAYERS - 1, 29)


def test_a_model_without_feedback_is_named():
    model = tiny_model(decoder_layers=LAYERS)
    soft = build({"name": "soft_exit"}, IDS, None, soft_model().config)
    with pytest.raises(ConfigError, match=r"`model\.soft_exit` must be true for objective soft_exit"):
        build({"name": "soft_exit"}, IDS, None, model.config)
    with pytest.raises(ValueError, match="soft exit needs a model with `soft_exit`"):
        decode_soft(model, soft.collate(draw()).rows, torch.zeros(21, 16, dtype=torch.float64))
    with pytest.raises(ConfigError, match="given"):
        build({"name": "soft_exit", "given": 1.2}, IDS, None, soft_model().config)


def test_a_grown_model_keeps_what_it_had():
    small = tiny_model(decoder_layers=LAYERS)
    grown = small.grown(small.config.model_copy(update={"soft_exit": True}))
    own = grown.state_dict()
    assert own.keys() - small.state_dict().keys() == {"feedback.weight"} and own["feedback.weight"].any()
    assert all(torch.equal(own[name], value) for name, value in small.state_dict().items())
    assert grown.shared.weight.dtype == torch.float64 and grown.head.weight is grown.shared.weight
    ramps = small.grown(small.config.model_copy(update={"off_ramps": "separate"})).ramps
    assert len(ramps) == LAYERS - 1 and all(torch.equal(ramp.weight, small.shared.weight) for ramp in ramps)
    with pytest.raises(ValueError, match=r"must keep every parameter, it lacks feedback\.weight"):
        grown.grown(small.config)


def test_nothing_is_given_where_a_model_is_judged():
    model = soft_model()
    soft = build({"name": "soft_exit", "given": 1.0}, IDS, None, model.config)
    examples = draw()
    nothing = [replace(example, given=np.zeros_like(example.given)) for example in examples]
    told = {}
    for mode in ("train", "eval"):
        getattr(model, mode)()
        for name, batch in (("given", soft.collate(examples)), ("nothing", soft.collate(nothing))):
            told[mode, name] = float(soft.losses(model, batch, unit_scale(soft, batch))[0].detach())
    assert told["eval", "given"] == told["eval", "nothing"] and told["train", "given"] != told["train", "nothing"]

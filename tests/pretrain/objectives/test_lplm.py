"""LPLM: the packed objective equals the plain one, whatever leaves where; what has left stays and is not computed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import ConfigError
from pretrain.models import ExitSample, Stream, pack_exits, pack_streams
from pretrain.objectives import build, lplm_reference
from pretrain.objectives.lplm import ExitExample
from tests.pretrain.objectives.cases import IDS, VOCAB, loss_and_gradients, tiny_model, unit_scale

WORD_STARTS = np.arange(VOCAB) % 3 == 0
LAYERS = 4


def shape(**changes):
    return tiny_model(decoder_layers=LAYERS, **changes)


def objective(model, **options):
    return build({"name": "lplm", **options}, IDS, WORD_STARTS, model.config)


def draw(copies, layers=LAYERS, seed=0, sizes=((5, 7), (3, 1), (8, 4), (2, 9), (1, 0))):
    rng = np.random.default_rng(seed)
    made = []
    for source, n in sizes:
        text = [np.concatenate([[IDS.bos], rng.integers(5, VOCAB, k), [IDS.eos]]) for k in (source, n)]
        made.append(ExitExample(text[0], text[1], np.empty(0, np.int64), rng.integers(1, layers + 1, (copies, n + 1))))
    return made


def leaving_at(given, layer):
    return [ExitExample(e.source, e.target, e.masked, np.full_like(e.exits, layer)) for e in given]


def compare(model, lplm, examples):
    batch = lplm.collate(examples)
    scale = unit_scale(lplm, batch)
    ours = loss_and_gradients(model, lambda: lplm.losses(model, batch, scale))
    plain = loss_and_gradients(model, lambda: lplm_reference.losses(model, examples, lplm, scale))
    ours.assert_equal(plain)


@pytest.mark.parametrize("copies", [1, 2, 10])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_packed_equals_the_plain_reference(norm, detach, copies):
    model = shape(norm=norm, logits_bias=detach, off_ramps="separate" if copies == 2 else "shared")
    for ramp in model.ramps:
        ramp.weight.data.add_(torch.randn_like(ramp.weight))
    options = {"first_row": "bos", "rows": "longest"} if norm == "post" else {}
    lplm = objective(
        model, copies=copies, detach_copied_state=detach, label_smoothing=0.1, length_weight=0.3, **options
    )
    compare(model, lplm, draw(copies))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("detach", [False, True])
def test_shallow_decoders_and_assignments_that_leave_layers_empty(layers, detach):
    model = tiny_model(decoder_layers=layers)
    lplm = objective(model, copies=3, detach_copied_state=detach, length_weight=0.1)
    compare(model, lplm, draw(3, layers))
    for layer in range(1, layers + 1):
        compare(model, lplm, leaving_at(draw(3, layers), layer))


@given(st.integers(0, 2**32 - 1), st.booleans(), st.integers(1, 4))
def test_any_assignment(seed, detach, copies):
    model = shape()
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(1, 5)), int(rng.integers(0, 6))) for _ in range(int(rng.integers(1, 4)))]
    compare(model, objective(model, copies=copies, detach_copied_state=detach), draw(copies, seed=seed, sizes=sizes))


def test_an_empty_micro_batch_runs_every_module_and_adds_nothing():
    model = shape()
    lplm = objective(model, length_weight=0.1)
    batch = lplm.collate([])
    total, sums = lplm.losses(model, batch, unit_scale(lplm, batch))
    total.backward()
    assert float(total.detach()) == 0 and not any(float(value) for value in sums.values())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_all_at_the_last_layer_is_the_plain_decoder_bit_for_bit():
    """What leaves at the top was never copied: the states are those of a decoder without exits."""
    model, given = shape(), leaving_at(draw(1), LAYERS)
    lplm = objective(model, copies=1)
    batch = lplm.collate(given)
    with torch.no_grad():
        memory = model.encode(batch.source)
        ours = model.decode(batch.rows, memory)
        streams = []
        for index, example in enumerate(given):
            n = len(example.target) - 1
            segments = [(n, n, 0, 0, 0, 0)]
            mask = np.full(n, IDS.mask)
            streams.append(
                Stream(mask, np.arange(n), segments, batch.source.memory_range(index), (0, n), example.target[1:], 0)
            )
        rows, _, _ = pack_streams(streams, batch.source.mask.n_rows)
        assert torch.equal(ours, model.decode(rows, memory))


def test_gradient_stops_at_a_copied_state_only_where_it_is_detached():
    """The loss of a token that goes on, by the embedding of one that left at once (SYSTEMS G, fact 7)."""
    for detach in (True, False):
        model = shape(positions="learned")
        exits = np.array([[1, LAYERS, LAYERS]])
        sample = ExitSample(np.full(3, IDS.mask), np.arange(3), (0, 2), exits)
        rows = pack_exits([sample], LAYERS, 2, detach)
        memory = torch.randn(2, 16, dtype=torch.float64)
        # Through layer 1 itself every row reads every other, so layer 1's keys are cut: only copied states are left.
        for name in ("k_proj", "v_proj"):
            getattr(model.decoder.layers[0].self_attn, name).weight.data.zero_()
            getattr(model.decoder.layers[0].self_attn, name).bias.data.zero_()
        h = model.decode(rows, memory)
        alone = (rows.layer_N == LAYERS).nonzero()[0]
        (h[alone] * torch.arange(16)).sum().backward()
        gradient = model.decoder.embed_positions.weight.grad[2]  # position 0, the token that left
        assert bool(gradient.any()) != detach


def test_what_has_left_is_computed_no_more_and_copies_are_computed_once():
    exits = np.array([[1, 2, 3, 4], [2, 2, 4, 4]])
    rows = pack_exits([ExitSample(np.full(4, IDS.mask), np.arange(4), (0, 1), exits)], LAYERS, 1, detach=False)
    assert [work.rows for work in rows.work(LAYERS)] == [4, 4, 4, 3]  # 4 rows, 4 rows, then 2 + 2 and 1 + 2 copies
    apart = pack_exits([ExitSample(np.full(4, IDS.mask), np.arange(4), (0, 1), exits)], LAYERS, 1, detach=True)
    assert [work.rows for work in apart.work(LAYERS)] == [4, 7, 4, 3]
    assert rows.copies_N.tolist() == [1, 1, 2, 1, 1, 1, 1] and rows.layer_N.tolist() == [1, 2, 2, 3, 4, 4, 4]
    assert rows.layer_N[rows.state_P].tolist() == exits.reshape(-1).tolist()
    assert rows.out_L[rows.state_P].tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("exits", [[[0, 1]], [[1, LAYERS + 1]], [[1]], [1, 2], np.empty((0, 2), np.int64)])
def test_exits_that_cannot_be(exits):
    with pytest.raises(ValueError, match=r"exits must be \[k, 2\] of layers 1\.\.4"):
        pack_exits([ExitSample(np.zeros(2), np.arange(2), (0, 1), np.asarray(exits))], LAYERS, 1, False)


def test_exits_are_uniform_and_each_sample_has_its_own():
    model = tiny_model(decoder_layers=6)
    lplm, rng = objective(model), np.random.default_rng(0)
    made = [lplm.corrupt(rng.integers(5, VOCAB, 30), np.array([0, 10, 20]), rng) for _ in range(200)]
    drawn = np.stack([example.exits for example in made])
    assert drawn.shape == (200, 10, 31)
    share = np.bincount(drawn.reshape(-1), minlength=7)[1:] / drawn.size
    np.testing.assert_allclose(share, 1 / 6, atol=0.005)
    assert abs(drawn.mean() - 3.5) < 0.02
    assert len({example.exits.tobytes() for example in made}) == 200


def test_paper_shuffles_sentences_and_hides_15_percent_in_spans():
    model, rng = tiny_model(), np.random.default_rng(0)
    lplm = objective(model)
    hidden = 0
    for _ in range(200):
        tokens = rng.integers(5, VOCAB, 100)
        example = lplm.corrupt(tokens, np.array([0, 30, 55]), rng)
        hidden += 100 - int((example.source[1:-1] != IDS.mask).sum())
        assert example.target.tolist() == [IDS.bos, *tokens, IDS.eos]
    assert hidden / 200 == 15
    whole = objective(model, corruption={"ratio": 0.0})
    tokens = np.arange(5, 35)
    seen = {tuple(whole.corrupt(tokens, np.array([0, 10, 20]), rng).source[1:-1].tolist()) for _ in range(100)}
    parts = np.split(tokens, [10, 20])
    assert seen == {tuple(np.concatenate([parts[i] for i in order])) for order in
                    ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))}  # fmt: skip


def test_released_replaces_a_tenth_of_its_masks_by_ordinary_tokens():
    model, rng = tiny_model(), np.random.default_rng(0)
    lplm = objective(model, preset="released", corruption={"random_masks": 1.0})
    assert lplm.options.copies == 1 and lplm.options.detach_copied_state and lplm.options.rows == "longest"
    sources = [lplm.corrupt(rng.integers(5, VOCAB, 40), np.array([0]), rng).source[1:-1] for _ in range(100)]
    drawn = np.concatenate(sources)
    assert not np.isin(drawn, [IDS.bos, IDS.pad, IDS.eos, IDS.mask, IDS.unk]).any() and drawn.max() == VOCAB - 1
    some = objective(model, preset="released")
    kept = [some.corrupt(np.full(200, 7), np.array([0]), rng).source for _ in range(200)]
    strange = sum(int(((x[1:-1] != 7) & (x[1:-1] != IDS.mask)).sum()) for x in kept)
    masks = sum(int((x == IDS.mask).sum()) for x in kept)
    assert 0.07 < strange / (strange + masks) < 0.13


@pytest.mark.parametrize(
    ("options", "message"),
    [({"copies": 0}, "copies"), ({"first_row": "eos"}, "first_row"), ({"corruption": {"ratio": 1.5}}, "ratio")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        objective(tiny_model(), **options)


def test_neighbours_in_a_batch_change_nothing():
    model, examples = shape(), draw(2)
    lplm = objective(model, copies=2)

    def logits(given):
        batch = lplm.collate(given)
        with torch.no_grad():
            all_states = model.logits(model.decode(batch.rows, model.encode(batch.source)))
        return all_states[batch.rows.state_P].split([e.exits.size for e in given])

    together = logits(examples)
    for index, example in enumerate(examples):
        torch.testing.assert_close(logits([example])[0], together[index], rtol=1e-12, atol=1e-12)


def test_preview_writes_with_the_first_and_the_last_layer():
    model, examples = shape(), draw(2)
    lplm = objective(model, copies=2)
    found = lplm.preview(model, lplm.collate(examples), 2)
    assert [preview.target for preview in found] == [e.target.tolist() for e in examples[:2]]
    for layer in (1, LAYERS):
        for preview, example in zip(found, leaving_at(examples[:2], layer), strict=True):
            run = lplm_reference.forward(model, [example], lplm, 0)
            assert preview.predicted[f"layer_{layer}"][1:] == run.logits_BTV[0].argmax(1).tolist()

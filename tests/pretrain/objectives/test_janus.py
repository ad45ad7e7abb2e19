"""JANUS: the packed objective equals the plain one, nothing leaks, and the patterns agree where they must."""

import numpy as np
import pytest
import torch

from pretrain.objectives import Example, build, janus_reference
from tests.pretrain.objectives.cases import IDS, SHAPE, VOCAB, examples, loss_and_gradients, tiny_model, unit_scale

EVERY_TERM = {"ar": 1.0, "nar": 0.7, "aux": 0.9, "kl_ar_aux": 2.0, "kl_nar_aux": 1.5, "kl_ar_nar": 0.5, "length": 0.2}
WORD_STARTS = np.ones(VOCAB, bool)


def objective(**options):
    return build({"name": "janus", "weights": EVERY_TERM, **options}, IDS, None, SHAPE)


def logits(model, janus, given):
    """Per term, the logits of each sample's rows."""
    batch = janus.collate(given)
    with torch.no_grad():
        all_rows = model.logits(model.decode(batch.rows, model.encode(batch.source)))
    return [
        [all_rows[(batch.row_sample_L == b) & (batch.term_L == term)] for b in range(len(given))] for term in range(3)
    ]


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("layout", ["bos_first", "eos_first"])
@pytest.mark.parametrize("share", [True, False])
def test_packed_equals_the_plain_reference(norm, layout, share):
    model = tiny_model(norm=norm, positions="sinusoidal" if share else "learned", logits_bias=share)
    janus, given = objective(ar_layout=layout, share_encoder=share, label_smoothing=0.1), examples()
    batch = janus.collate(given)
    scale = unit_scale(janus, batch)
    ours = loss_and_gradients(model, lambda: janus.losses(model, batch, scale))
    plain = loss_and_gradients(model, lambda: janus_reference.losses(model, given, janus.layout, scale, 0.1))
    ours.assert_equal(plain)


@pytest.mark.parametrize("layout", ["bos_first", "eos_first"])
def test_no_row_sees_what_it_predicts_or_what_follows(layout):
    model, janus = tiny_model(), objective(ar_layout=layout)
    (given,) = examples(sizes=((5, 8, 5),))
    before = logits(model, janus, [given])
    for position in range(1, len(given.target) - 1):
        target = given.target.copy()
        target[position] = 5 + (target[position] + 7) % (VOCAB - 5)
        after = logits(model, janus, [Example(given.source, target, given.masked)])
        ar_before, ar_after = before[0][0], after[0][0]
        row = position - janus.layout.shift  # the row that predicts the changed token
        assert torch.equal(ar_before[: row + 1], ar_after[: row + 1])
        assert not torch.allclose(ar_before[row + 1 :], ar_after[row + 1 :])
        if position in given.masked:
            rank = int(np.searchsorted(given.masked, position))
            assert torch.equal(before[1][0], after[1][0])
            assert torch.equal(before[2][0][: rank + 1], after[2][0][: rank + 1])
            if rank + 1 < len(given.masked):
                assert not torch.allclose(before[2][0][rank + 1 :], after[2][0][rank + 1 :])
        else:
            assert not torch.allclose(before[1][0], after[1][0])


def test_first_aux_row_equals_the_first_nar_row():
    model, janus = tiny_model(), objective()
    _, nar, aux = logits(model, janus, examples())
    for nar_rows, aux_rows in zip(nar, aux, strict=True):
        torch.testing.assert_close(aux_rows[:1], nar_rows[:1], rtol=0, atol=1e-12)


def test_nar_rows_do_not_know_of_the_aux_pattern():
    model, given = tiny_model(), [e for e in examples() if len(e.masked)]
    cmlm = build({"name": "cmlm"}, IDS, None, SHAPE)
    batch = cmlm.collate(given)
    alone = model.logits(model.decode(batch.rows, model.encode(batch.source)))
    torch.testing.assert_close(torch.cat(logits(model, objective(), given)[1]), alone, rtol=0, atol=1e-12)


def test_samples_do_not_see_each_other():
    model, janus, given = tiny_model(), objective(), examples()
    together = logits(model, janus, given)
    for b, example in enumerate(given):
        for term, rows in enumerate(logits(model, janus, [example])):
            torch.testing.assert_close(rows[0], together[term][b], rtol=0, atol=1e-12)


def test_empty_and_unmasked_batches_are_finite_and_touch_every_parameter():
    model, janus = tiny_model(), objective()
    for given in ([], examples(sizes=((3, 4, 0),))):
        batch = janus.collate(given)
        total, sums, gradients = loss_and_gradients(model, lambda b=batch: janus.losses(model, b, unit_scale(janus, b)))
        assert torch.isfinite(total)
        assert float(sums["nar"]) == 0.0
        assert len(gradients) == len(list(model.named_parameters()))
        assert all(bool(torch.isfinite(g).all()) for g in gradients.values())


def test_dropout_draws_once_or_twice():
    torch.manual_seed(0)
    model, given = tiny_model(dropout=0.5).train(), examples(sizes=((5, 7, 3),))
    shared, twice = objective(), objective(share_encoder=False)
    assert shared.collate(given).source.n_samples == 1
    batch = twice.collate(given)
    memory = model.encode(batch.source)
    assert not torch.allclose(memory[: len(memory) // 2], memory[len(memory) // 2 :])


def test_presets_differ_where_paper_and_code_do():
    paper, released, pretrain = (
        build({"name": "janus", "preset": p}, IDS, WORD_STARTS, SHAPE)
        for p in ("paper", "released", "released_pretrain")
    )
    assert paper.weights == {**EVERY_TERM, "nar": 1.0, "aux": 1.0, "kl_nar_aux": 2.0, "kl_ar_nar": 0.0, "length": 0.0}
    assert released.weights == {
        "ar": 1.0, "nar": 0.5, "aux": 0.5, "length": 0.1, "kl_ar_aux": 3.0, "kl_nar_aux": 1.0, "kl_ar_nar": 1.0,
    }  # fmt: skip
    assert pretrain.weights == {
        "ar": 0.5, "nar": 0.5, "aux": 0.5, "length": 0.0, "kl_ar_aux": 0.5, "kl_nar_aux": 0.5, "kl_ar_nar": 0.0,
    }  # fmt: skip
    layouts = [(one.layout.layout, one.layout.query_position_offset) for one in (paper, released, pretrain)]
    assert layouts == [("bos_first", 1), ("bos_first", 0), ("eos_first", 0)]
    assert [one.options.label_smoothing for one in (paper, released, pretrain)] == [0.0, 0.1, 0.0]
    assert [one.options.share_encoder for one in (paper, released, pretrain)] == [True, False, False]
    mixed = build({"name": "janus", "preset": "released", "weights": {"aux": 2.0}}, IDS, None, SHAPE)
    assert (mixed.weights["aux"], mixed.weights["kl_ar_aux"]) == (2.0, 3.0)


def test_a_preset_corrupts_as_the_code_it_names():
    # The translation code knows no corruption of texts, the pre-training code has one of its own.
    paper, released, pretrain = (
        build({"name": "janus", "preset": p}, IDS, WORD_STARTS, SHAPE).options
        for p in ("paper", "released", "released_pretrain")
    )
    assert released.corruption == paper.corruption
    assert (released.pair_masking, released.pair_ratio, released.pair_mean_span) == ("spans", 0.7, 2.0)
    assert pretrain.corruption != paper.corruption and pretrain.pair_masking == "uniform"
    changed = build(
        {"name": "janus", "preset": "released_pretrain", "corruption": {"whole_words": False}}, IDS, None, 24
    )
    assert changed.options.corruption.decoder_ratio == 0.3 and not changed.options.corruption.whole_words


def test_released_pretraining_divides_every_sum_by_the_target_tokens():
    model, given = tiny_model(), examples()
    janus = build({"name": "janus", "preset": "released_pretrain"}, IDS, WORD_STARTS, SHAPE)
    batch = janus.collate(given)
    tokens = sum(len(e.target) for e in given)  # the rotated layout predicts BOS as well
    assert {v for k, v in janus.counts(batch).items() if k != "length"} == {tokens}
    total, _ = janus.losses(model, batch, unit_scale(janus, batch))
    ones = dict.fromkeys(janus.weights, 1.0)
    _, sums = janus_reference.losses(model, given, janus.layout, ones, label_smoothing=0.0)
    expected = 0.5 * (sums["ar"] + sums["nar"] + sums["aux"]) + 0.5 * (sums["kl_nar_aux"] + sums["kl_ar_aux"])
    torch.testing.assert_close(total.detach(), expected / tokens, rtol=1e-10, atol=0)


def test_reductions_count_what_they_say():
    given = examples()
    masked = sum(len(e.masked) for e in given)
    tokens = sum(len(e.target) - 1 for e in given)
    own = objective().counts(objective().collate(given))
    assert own == {
        "ar": tokens,
        "nar": masked,
        "aux": masked,
        **dict.fromkeys(own.keys() - {"ar", "nar", "aux", "length"}, masked),
        "length": 4,
    }
    everything = objective(ce_reduction="target_tokens", kl_reduction="target_tokens")
    counts = everything.counts(everything.collate(given))
    assert {v for k, v in counts.items() if k != "length"} == {tokens}


def test_preview_fills_in_what_each_mode_predicts():
    model, janus, given = tiny_model(), objective(), examples()
    batch = janus.collate(given)
    shown = janus.preview(model, batch, limit=2)
    assert len(shown) == 2
    assert shown[0].target == given[0].target.tolist()
    assert shown[0].source == given[0].source.tolist()
    visible = np.setdiff1d(np.arange(len(given[0].target)), given[0].masked)
    assert [shown[0].predicted["nar"][i] for i in visible] == given[0].target[visible].tolist()
    assert set(shown[1].predicted) == {"ar"}  # nothing is masked there

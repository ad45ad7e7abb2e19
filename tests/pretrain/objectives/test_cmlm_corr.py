"""CMLM+Corr: the masked pass is CMLM's, and what is corrected is what the model itself writes from MASKs alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parlance_kernels import SampleMask
from pretrain.cost.flops import deciding_flops, decoder_flops
from pretrain.models import DecoderRows, SourceRows
from pretrain.objectives import build
from pretrain.objectives.cmlm_corr import ReplacedExample
from tests.pretrain.objectives.cases import IDS, SHAPE, VOCAB, examples, loss_and_gradients, tiny_model, unit_scale

SIZES = ((5, 7, 3), (3, 4, 0), (8, 6, 6), (2, 9, 1), (4, 1, 1), (6, 12, 4))


def objective(**options):
    return build({"name": "cmlm_corr", **options}, IDS, None, SHAPE)


def replacing(share=0.3, sizes=SIZES, seed=0):
    """Examples with the share of the visible tokens replaced."""
    rng, made = np.random.default_rng(seed), []
    for example in examples(seed, sizes):
        shown = np.setdiff1d(np.arange(1, len(example.target) - 1), example.masked)
        replaced = np.sort(rng.permutation(shown)[: int(share * len(shown))])
        made.append(ReplacedExample(example.source, example.target, example.masked, replaced))
    return made


def plain_losses(model, given, eps):
    """({term: sum}, {term: count}) by the definition: a sample at a time, three decoder passes over ordinary rows."""
    sums, counts = dict.fromkeys(("nar", "corr"), 0.0), dict.fromkeys(("nar", "corr"), 0)

    def logits(example, tokens, where):
        source = SourceRows.pack([example.source])
        n, m = len(tokens), source.mask.n_rows
        own, cross = SampleMask.build([(0, n, 0, n, 0, 0, 0, 0)], n), SampleMask.build([(0, n, 0, m, 0, 0, 0, 0)], m)
        tokens_R, all_R = torch.from_numpy(tokens), torch.arange(n)
        rows = DecoderRows(tokens_R, all_R, n, own, cross, all_R, own, cross)
        return model.logits(model.decode(rows, model.encode(source)))[torch.from_numpy(where)]

    def cross_entropy(logits_LV, target_L):
        return torch.nn.functional.cross_entropy(
            logits_LV, torch.from_numpy(target_L), reduction="sum", label_smoothing=eps
        )

    for e in given:
        content, hidden = np.arange(1, len(e.target) - 1), e.target.copy()
        hidden[e.masked] = IDS.mask
        everything = e.target.copy()
        everything[content] = IDS.mask
        replaced = hidden.copy()
        replaced[e.replaced] = logits(e, everything, e.replaced).argmax(dim=1).numpy()
        for term, tokens, where in (("nar", hidden, e.masked), ("corr", replaced, e.replaced)):
            sums[term] = sums[term] + cross_entropy(logits(e, tokens, where), e.target[where])
            counts[term] += len(where)
    return sums, counts


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_three_packed_passes_equal_three_plain_ones(eps):
    model, corr, some = tiny_model(), objective(label_smoothing=eps, length_weight=0.0), replacing()
    batch = corr.collate(some)
    scale = unit_scale(corr, batch)
    plain_sums, counts = plain_losses(model, some, eps)
    assert {name: corr.counts(batch)[name] for name in counts} == counts and counts["corr"] > 4

    def plain():
        untouched = 0.0 * model.length_head.weight.sum()
        return untouched + sum(scale[name] * value for name, value in plain_sums.items()), plain_sums

    theirs = loss_and_gradients(model, plain)
    ours = loss_and_gradients(model, lambda: corr.losses(model, batch, scale))
    ours.assert_equal(theirs)


def test_the_masked_pass_is_that_of_cmlm():
    """Same draws, same tokens hidden, same sum: the correction only adds."""
    corr, cmlm = objective(), build({"name": "cmlm"}, IDS, None, SHAPE)
    model, target = tiny_model(), np.array([IDS.bos, *range(5, 25), IDS.eos])
    pairs = [
        [one.corrupt_pair(target, target, np.random.default_rng(seed)) for seed in range(4)] for one in (corr, cmlm)
    ]
    sums = [one.losses(model, one.collate(made), dict.fromkeys(one.weights, 1.0))[1] for one, made in
            zip((corr, cmlm), pairs, strict=True)]  # fmt: skip
    torch.testing.assert_close(sums[0]["nar"], sums[1]["nar"], rtol=1e-12, atol=0)
    torch.testing.assert_close(sums[0]["length"], sums[1]["length"], rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 30), share=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
def test_replaced_tokens_are_a_share_of_the_visible_ones(n, share, seed):
    target = np.array([IDS.bos, *(5 + np.arange(n) % (VOCAB - 5)), IDS.eos])
    example = objective(replaced=share).corrupt_pair(target, target, np.random.default_rng(seed))
    shown = n - len(example.masked)
    assert len(example.replaced) == int(share * shown) == len(set(example.replaced))
    assert not set(example.replaced) & {0, n + 1, *example.masked}
    assert np.array_equal(example.replaced, np.sort(example.replaced))


def test_nothing_to_replace_and_nothing_at_all():
    model, corr = tiny_model(), objective()
    for some in ([], replacing(share=0.0), examples()):
        batch = corr.collate(some)
        total, sums, gradients = loss_and_gradients(model, lambda b=batch: corr.losses(model, b, unit_scale(corr, b)))
        assert torch.isfinite(total) and float(sums["corr"]) == 0.0 and corr.counts(batch)["corr"] == 0
        assert len(gradients) == len(list(model.named_parameters()))


def test_the_forward_that_guesses_is_counted():
    config, corr = tiny_model().config, objective()
    batch = corr.collate(replacing())
    counted = decoder_flops(config, batch.guess.work(config.decoder_layers), corr.counts(batch)["corr"]).forward
    assert deciding_flops(config, batch) == counted > 0
    cmlm = build({"name": "cmlm"}, IDS, None, SHAPE)
    assert deciding_flops(config, cmlm.collate(examples())) == 0


def test_preview_shows_both_passes():
    model, corr, some = tiny_model(), objective(), replacing()
    shown = corr.preview(model, corr.collate(some), limit=6)
    assert shown[5].places == {"nar": some[5].masked.tolist(), "corr": some[5].replaced.tolist()}

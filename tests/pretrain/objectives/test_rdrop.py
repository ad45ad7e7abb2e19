"""R-Drop over NAR and AUX: two copies, each JANUS's NAR and AUX; KLs between copies alone, zero without dropout."""

import numpy as np
import torch
from torch.nn import functional as F

from pretrain.cost.flops import facts
from pretrain.objectives import build
from pretrain.objectives.base import Example
from tests.pretrain.objectives.cases import IDS, SHAPE, examples, loss_and_gradients, tiny_model, unit_scale

TERMS = {"nar": 1.0, "aux": 1.0, "kl_nar": 1.0, "kl_aux": 1.0, "length": 0.1}


def objective(**options):
    return build({"name": "rdrop", **options}, IDS, None, SHAPE)


def test_the_loss_is_the_released_one():
    assert objective().weights == TERMS
    given = examples()
    counts = objective().counts(objective().collate(given))
    masked = sum(len(e.masked) for e in given)
    assert counts == {"nar": 2 * masked, "aux": 2 * masked, "kl_nar": masked, "kl_aux": masked, "length": 8}


def test_without_dropout_both_copies_are_janus():
    """Every mean equals that of NAR and AUX in `janus` on the same rows, and nothing is between equal copies."""
    model, given = tiny_model(), examples()
    janus = build({"name": "janus", "label_smoothing": 0.1}, IDS, None, SHAPE)
    rdrop = objective(label_smoothing=0.1)
    means = []
    for one in (janus, rdrop):
        batch = one.collate(given)
        _, sums = one.losses(model, batch, dict.fromkeys(one.weights, 1.0))
        means.append({name: value / one.counts(batch)[name] for name, value in sums.items()})
    for term in ("nar", "aux", "length"):
        torch.testing.assert_close(means[1][term], means[0][term], rtol=1e-12, atol=0)
    for term in ("kl_nar", "kl_aux"):
        assert abs(float(means[1][term])) < 1e-14


def test_with_dropout_every_term_is_its_definition():
    """Loss and gradients from the logits that the forward really had."""
    model, given, eps = tiny_model(dropout=0.3).train(), examples(), 0.1
    rdrop = objective(label_smoothing=eps)
    batch = rdrop.collate(given)
    scale = unit_scale(rdrop, batch)
    torch.manual_seed(3)
    ours = loss_and_gradients(model, lambda: rdrop.losses(model, batch, scale))

    def plain():
        memory = model.encode(batch.source)
        logp = model.logits(model.decode(batch.rows, memory)).log_softmax(dim=1)
        sums = {}
        for term, name in enumerate(("nar", "aux")):
            mine = batch.term_L == term
            target = batch.target_L[mine]
            sums[name] = F.nll_loss(logp[mine], target, reduction="sum") * (1 - eps) - eps * logp[mine].mean(1).sum()
            one, two = [], []
            for b, example in enumerate(given):
                rows = (mine & (batch.row_sample_L == b)).nonzero().squeeze(1)
                one.append(rows[: len(example.masked)])
                two.append(rows[len(example.masked) :])
            p, q = logp[torch.cat(one)], logp[torch.cat(two)]
            assert not torch.allclose(p, q)
            sums[f"kl_{name}"] = 0.5 * ((p.exp() - q.exp()) * (p - q)).sum()
        lengths = torch.tensor([len(e.target) for e in given] * 2)
        sums["length"] = F.cross_entropy(model.length_logits(memory, batch.source), lengths, reduction="sum")
        return sum(scale[name] * value for name, value in sums.items()), sums

    torch.manual_seed(3)
    theirs = loss_and_gradients(model, plain)
    ours.assert_equal(theirs)


def test_empty_and_unmasked_batches_touch_every_parameter():
    model, rdrop = tiny_model(), objective()
    for given in ([], examples(sizes=((3, 4, 0),))):
        batch = rdrop.collate(given)
        total, _, gradients = loss_and_gradients(model, lambda b=batch: rdrop.losses(model, b, unit_scale(rdrop, b)))
        assert torch.isfinite(total) and len(gradients) == len(list(model.named_parameters()))


def test_copies_are_one_text_to_the_meters_and_the_preview():
    model, rdrop, given = tiny_model(), objective(), examples()
    batch = rdrop.collate(given)
    assert batch.n_samples == len(given) and batch.n_tokens == sum(len(e.target) for e in given)
    assert facts(model)["masked"](batch) == sum(len(e.masked) for e in given)
    shown = rdrop.preview(model, batch, limit=1)[0]
    assert set(shown.predicted) == {"nar", "aux"} and shown.source == given[0].source.tolist()
    assert isinstance(rdrop.corrupt_pair(given[0].source, given[0].target, np.random.default_rng(0)), Example)

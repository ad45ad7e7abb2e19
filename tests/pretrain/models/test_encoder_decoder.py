"""The packed model: equal to its padded definition, tied, checkpointed and independent of its neighbours."""

import numpy as np
import pytest
import torch

from pretrain.models import SourceRows, reference
from pretrain.models.golden import golden
from pretrain.models.patterns import ArLayout
from pretrain.objectives import build
from tests.pretrain.objectives.cases import IDS, SHAPE, examples, loss_and_gradients, tiny_model, unit_scale


@pytest.mark.parametrize("changes", [{}, {"norm": "pre"}, {"positions": "sinusoidal", "activation": "relu"}])
@pytest.mark.parametrize("name", ["denoise", "cmlm"])
def test_single_stream_patterns_equal_the_padded_definition(changes, name):
    model, given = tiny_model(**changes), [e for e in examples() if len(e.masked)]
    objective = build({"name": name}, IDS, None, SHAPE)
    batch = objective.collate(given)
    packed = model.logits(model.decode(batch.rows, model.encode(batch.source)))

    sources = [torch.from_numpy(e.source) for e in given]
    source = reference.pad(sources, IDS.pad)
    real = reference.pad([torch.ones_like(s) for s in sources], 0).bool()
    memory = reference.encode(model, source, torch.arange(source.shape[1]).expand_as(source), real)
    for b, e in enumerate(given):
        target = torch.from_numpy(e.target)
        if name == "denoise":
            tokens, rows = torch.from_numpy(objective.layout.content(e.target)), slice(None)
            visible = torch.ones(len(tokens), len(tokens)).tril().bool()
        else:
            tokens, rows = target.clone(), torch.from_numpy(e.masked)
            tokens[rows] = IDS.mask
            visible = torch.ones(len(tokens), len(tokens)).bool()
        content = (tokens[None], torch.arange(len(tokens))[None], visible[None])
        h, _ = reference.decode(model, content, None, memory[b : b + 1], real[b : b + 1])
        torch.testing.assert_close(packed[batch.row_sample_L == b], model.logits(h[0])[rows], rtol=0, atol=1e-11)


def test_tied_weights_are_one_parameter():
    model = tiny_model()
    assert model.head.weight is model.shared.weight
    assert [n for n, _ in model.named_parameters() if "shared" in n or "head" in n] == [
        "shared.weight",
        "length_head.weight",
    ]


def test_activation_checkpointing_changes_nothing():
    given, janus = examples(), build({"name": "janus"}, IDS, None, SHAPE)
    batch = janus.collate(given)
    runs = []
    for checkpointing in (False, True):
        model = tiny_model(dropout=0.3, attention_dropout=0.2).train()
        model.checkpointing = checkpointing
        torch.manual_seed(7)
        runs.append(loss_and_gradients(model, lambda m=model: janus.losses(m, batch, unit_scale(janus, batch))))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][2][n], g) for n, g in runs[1][2].items())


def test_length_predictor_reads_only_its_own_source():
    model = tiny_model().eval()
    sources = [e.source for e in examples()]
    packed = SourceRows.pack(sources)
    together = model.length_logits(model.encode(packed), packed)
    for b, source in enumerate(sources):
        alone = SourceRows.pack([source])
        torch.testing.assert_close(together[b], model.length_logits(model.encode(alone), alone)[0], rtol=0, atol=1e-12)


def test_pad_row_starts_at_zero_and_masks_are_reused_across_layers():
    model = tiny_model()
    assert not model.shared.weight[IDS.pad].detach().any()
    batch = build({"name": "janus"}, IDS, None, SHAPE).collate(examples())
    assert batch.rows.self_mask.groups is batch.rows.self_mask.groups


def test_golden_is_reproducible_and_notices_a_changed_weight():
    model = tiny_model()
    layout = ArLayout.aligned("eos_first", IDS)
    first, again = (golden(model, layout, ["ar", "nar", "causal"]) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.no_grad():
        model.decoder.layers[1].fc2.weight[3, 5] += 1e-3
    changed = golden(model, layout, ["ar", "nar", "causal"])
    assert all(not torch.equal(first[f"logits/{m}"], changed[f"logits/{m}"]) for m in ("ar", "nar", "causal"))
    with pytest.raises(ValueError, match="mode must be one of"):
        golden(model, layout, ["soft"])


def test_positions_follow_fairseq_and_bart():
    model = tiny_model()
    rows = SourceRows.pack([np.array([0, 9, 2]), np.array([0, 2])])
    assert rows.positions_R.tolist() == [0, 1, 2, 0, 1]
    table = model.encoder.embed_positions
    assert torch.equal(table(torch.tensor([0])), table.weight[2:3])


def test_golden_logits_of_hard_exit_are_those_of_each_layers_own_head():
    model = tiny_model(decoder_layers=3, off_ramps="separate")
    layout = ArLayout.aligned("bos_first", IDS)
    before = golden(model, layout, ("hard_exit",))["logits/hard_exit"]
    for ramp in model.ramps:
        ramp.weight.data.neg_()
    after = golden(model, layout, ("hard_exit",))["logits/hard_exit"]
    torch.testing.assert_close(after[:6], -before[:6])
    assert torch.equal(after[6:], before[6:]) and len(after) == 9  # three rows leave at each layer

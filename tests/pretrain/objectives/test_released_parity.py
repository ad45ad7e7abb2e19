"""The released JANUS code's own numbers: preset `released` reproduces them in float64.

All rows by the reference, the rows that carry a loss (and every loss term and gradient) by the packed path.
"""

import numpy as np
import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder, SpecialIds
from pretrain.objectives import Example, build, janus_reference

IDS = SpecialIds(bos=0, pad=1, eos=2, mask=3, unk=3)
CONFIG = ModelConfig(
    vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, heads=4, ffn_dim=64, activation="relu",
    max_positions=64, embed_scale=True, embed_norm=False, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
OWN_NAMES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_length.weight": "length_head.weight"}
LOSSES = {
    "ar": "loss_ce_ar", "nar": "loss_ce_nar_content", "aux": "loss_ce_aux_query", "length": "loss_ce_length",
    "kl_ar_nar": "loss_kl_ar_nar", "kl_nar_aux": "loss_kl_nar_aux", "kl_ar_aux": "loss_kl_ar_aux",
}  # fmt: skip
TOLERANCE = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(scope="module")
def golden(test_data):
    folder = test_data / "released_goldens"
    if not folder.exists():
        pytest.skip(f"no released goldens at {folder}")
    files = ("janus_weights_random", "janus_batch1_f64", "janus_grads_batch1_f64")
    return [dict(np.load(folder / f"{name}.npz", allow_pickle=False)) for name in files]


@pytest.fixture(scope="module")
def model(golden):
    model = EncoderDecoder(CONFIG, IDS).double()
    own = model.state_dict()
    for name, value in golden[0].items():
        name = OWN_NAMES.get(name, name)
        if name in own:
            own[name] = torch.from_numpy(value).double()
    own["head.weight"] = own["shared.weight"]
    model.load_state_dict(own)
    return model


@pytest.fixture(scope="module")
def examples(golden):
    batch = golden[1]
    made = []
    for source, target, masked in zip(
        batch["in_src_tokens"], batch["in_target"], batch["in_masked_positions"], strict=True
    ):
        made.append(Example(source[source != IDS.pad], target[target != IDS.pad], masked[masked >= 0]))
    return made


@pytest.fixture(scope="module")
def objective():
    return build({"name": "janus", "preset": "released"}, IDS, None, CONFIG)


def scales(objective, batch):
    return {name: objective.weights[name] / count for name, count in objective.counts(batch).items()}


def close(ours, theirs):
    torch.testing.assert_close(ours.detach(), torch.from_numpy(np.asarray(theirs)), **TOLERANCE)


def test_reference_reproduces_every_row_and_mask(golden, model, examples, objective):
    batch = golden[1]
    run = janus_reference.forward(model, examples, objective.layout)
    close(run.length_BN, batch["logits_length"])
    content_rows = batch["in_nar_content_w"].shape[1]
    assert run.nar_content_BTV.shape[1] == content_rows
    for b, e in enumerate(examples):
        n, hidden = len(e.target), len(e.masked)
        close(run.ar_query_BTV[b, : n - 1], batch["logits_ar"][b, : n - 1])
        close(run.nar_content_BTV[b, : n + hidden], batch["logits_nar_content"][b, : n + hidden])
        close(run.aux_query_BQV[b, :hidden], batch["logits_aux_query"][b, :hidden])
    assert np.array_equal(run.content_visible_BTT.numpy(), batch["mask_content_visible"].astype(bool))
    assert np.array_equal(run.query_visible_BQT.numpy(), batch["mask_query_visible"].astype(bool))


def test_packed_reproduces_every_row_that_carries_a_loss(golden, model, examples, objective):
    released, batch = golden[1], objective.collate(examples)
    logits = model.logits(model.decode(batch.rows, model.encode(batch.source)))
    for b, e in enumerate(examples):
        n, hidden = len(e.target), len(e.masked)
        theirs = [
            released["logits_ar"][b, : n - 1],
            released["logits_nar_content"][b, n - hidden : n],
            released["logits_aux_query"][b, :hidden],
        ]
        for term, rows in enumerate(theirs):
            close(logits[(batch.row_sample_L == b) & (batch.term_L == term)], rows)


def test_packed_reproduces_every_loss_and_gradient(golden, model, examples, objective):
    _, released, gradients = golden
    batch = objective.collate(examples)
    model.zero_grad()
    total, sums = objective.losses(model, batch, scales(objective, batch))
    counts = objective.counts(batch)
    for name, theirs in LOSSES.items():
        close(sums[name] / counts[name], released[theirs])
    close(total, released["loss_total"])
    total.backward()
    own = dict(model.named_parameters())
    compared = 0
    for name, theirs in gradients.items():
        if name.startswith("grad."):
            close(own[OWN_NAMES.get(name[5:], name[5:])].grad, theirs)
            compared += 1
    assert compared == len(own)


def test_reference_losses_equal_the_packed_ones(model, examples, objective):
    batch = objective.collate(examples)
    scale = scales(objective, batch)
    total, sums = objective.losses(model, batch, scale)
    expected, expected_sums = janus_reference.losses(model, examples, objective.layout, scale, 0.1)
    torch.testing.assert_close(total, expected, **TOLERANCE)
    for name, value in expected_sums.items():
        torch.testing.assert_close(sums[name], value, **TOLERANCE)

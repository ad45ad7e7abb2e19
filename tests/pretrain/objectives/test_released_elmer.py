"""The released ELMER code's own numbers: preset `released` reproduces them in float64, by the reference and packed."""

import numpy as np
import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder, SpecialIds
from pretrain.objectives import build, lplm_reference
from pretrain.objectives.lplm import ExitExample

IDS = SpecialIds(bos=0, pad=1, eos=2, mask=59, unk=58)
CONFIG = ModelConfig(
    vocab_size=60, d_model=32, encoder_layers=4, decoder_layers=4, heads=4, ffn_dim=64, max_positions=64,
    dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
TOLERANCE = {"rtol": 0.0, "atol": 1e-10}
CASES = ("mixed", "last", "early")


@pytest.fixture(scope="module")
def golden(test_data):
    file = test_data / "released_goldens" / "elmer_pretrain.npz"
    if not file.exists():
        pytest.skip(f"no released goldens at {file}")
    return dict(np.load(file, allow_pickle=False))


@pytest.fixture(scope="module")
def model(golden):
    model = EncoderDecoder(CONFIG, IDS).double()
    own = model.state_dict()
    for key, value in golden.items():
        if key.startswith("w/model."):
            own[key.removeprefix("w/model.")].copy_(torch.from_numpy(value))
    own["head.weight"].copy_(own["shared.weight"])
    return model


@pytest.fixture(scope="module")
def lplm():
    return build({"name": "lplm", "preset": "released"}, IDS, np.ones(60, bool), CONFIG)


def examples_of(golden, case):
    """The padded arrays of the release as examples; exit layers are counted from 0 there."""
    made = []
    for source, seen, label, exits in zip(
        golden["in/source_ids"],
        golden["in/source_mask"],
        golden["in/labels"],
        golden[f"{case}/exit_layers"],
        strict=True,
    ):
        target = np.concatenate([[IDS.bos], label[label != IDS.pad]])
        made.append(ExitExample(source[seen], target, np.empty(0, np.int64), exits[None] + 1))
    return made


def close(ours, theirs):
    torch.testing.assert_close(ours.detach(), torch.from_numpy(np.asarray(theirs)), **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_reference_reproduces_every_layer_and_state(golden, model, lplm, case):
    run = lplm_reference.forward(model, examples_of(golden, case), lplm, 0)
    executed = len(golden[f"{case}/lin"])  # the release stops once every row has left
    close(run.input_LBTD[:executed], golden[f"{case}/lin"])
    close(run.output_LBTD[:executed], golden[f"{case}/lout"])
    close(run.state_BTD, golden[f"{case}/exit_states"])
    close(run.logits_BTV, golden[f"{case}/logits"])


@pytest.mark.parametrize("case", CASES)
def test_packed_reproduces_every_state_loss_and_gradient(golden, model, lplm, case):
    batch = lplm.collate(examples_of(golden, case))
    with torch.no_grad():
        states = model.decode(batch.rows, model.encode(batch.source))[batch.rows.state_P]
    close(states, golden[f"{case}/exit_states"].reshape(-1, 32))
    close(model.logits(states), golden[f"{case}/logits"].reshape(-1, 60))

    count = lplm.counts(batch)["lplm"]
    assert count == 21
    model.zero_grad()
    total, sums = lplm.losses(model, batch, {"lplm": 1 / count, "length": 0.0})
    close(total, golden[f"{case}/loss"])
    close(sums["lplm"] / count, golden[f"{case}/loss"])
    total.backward()
    own = dict(model.named_parameters())
    compared = set()
    for name, norm in zip(golden["param_names"].tolist(), golden[f"{case}/grad_norms"], strict=True):
        name = name.removeprefix("model.")
        close(own[name].grad.norm(), norm)
        compared.add(name)
        if f"{case}/grad/model.{name}" in golden:
            theirs = torch.from_numpy(golden[f"{case}/grad/model.{name}"]).double()
            torch.testing.assert_close(own[name].grad, theirs, rtol=1e-6, atol=1e-8)
    assert compared == set(own) - {"length_head.weight"}
    squares = sum(float(own[name].grad.square().sum()) for name in compared)
    close(torch.tensor(squares**0.5, dtype=torch.float64), golden[f"{case}/total_grad_norm"])

"""The released ELMER code's own numbers: preset `released` reproduces them in float64, by the reference and packed."""

import numpy as np
import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder, SpecialIds
from pretrain.models.soft_exit import decode_soft
from pretrain.objectives import build, lplm_reference
from pretrain.objectives.lplm import ExitExample
from pretrain.objectives.soft_exit import GivenExample

IDS = SpecialIds(bos=0, pad=1, eos=2, mask=59, unk=58)
CONFIG = ModelConfig(
    vocab_size=60, d_model=32, encoder_layers=4, decoder_layers=4, heads=4, ffn_dim=64, max_positions=64,
    dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
SOFT = CONFIG.model_copy(update={"soft_exit": True})
OWN_NAMES = {"concat_head.weight": "feedback.weight"}
TOLERANCE = {"rtol": 0.0, "atol": 1e-10}
CASES = ("mixed", "last", "early")


def arrays(test_data, name):
    file = test_data / "released_goldens" / f"{name}.npz"
    if not file.exists():
        pytest.skip(f"no released goldens at {file}")
    return dict(np.load(file, allow_pickle=False))


def with_weights(model, golden):
    """`model` with the weights of the release, in float64."""
    own = model.double().state_dict()
    for key, value in golden.items():
        if key.startswith("w/"):
            name = key.removeprefix("w/").removeprefix("model.")
            own[OWN_NAMES.get(name, name)].copy_(torch.from_numpy(value))
    own["head.weight"].copy_(own["shared.weight"])
    return model


@pytest.fixture(scope="module")
def golden(test_data):
    return arrays(test_data, "elmer_pretrain")


@pytest.fixture(scope="module")
def model(golden):
    return with_weights(EncoderDecoder(CONFIG, IDS), golden)


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


@pytest.fixture(scope="module")
def soft_golden(test_data):
    return arrays(test_data, "elmer_softexit")


@pytest.fixture(scope="module")
def soft_model(soft_golden):
    return with_weights(EncoderDecoder(SOFT, IDS), soft_golden)


@pytest.fixture(scope="module")
def soft_exit():
    return build({"name": "soft_exit", "preset": "released"}, IDS, None, SOFT)


def soft_examples(golden, case):
    made = []
    patterns = golden[f"{case}/gold_pattern"].astype(bool) if case != "infer" else np.zeros((3, 3, 10), bool)
    for b in range(3):
        label = golden["in/labels"][b]
        target = np.concatenate([[IDS.bos], label[label != IDS.pad]])
        source = golden["in/source_ids"][b][golden["in/source_mask"][b]]
        made.append(GivenExample(source, target, np.empty(0, np.int64), patterns[:, b]))
    return made


@pytest.mark.parametrize("case", ["gold0", "gold03"])
def test_soft_exit_reproduces_every_layer_loss_and_gradient(soft_golden, soft_model, soft_exit, case):
    batch = soft_exit.collate(soft_examples(soft_golden, case))
    with torch.no_grad():
        states = decode_soft(soft_model, batch.rows, soft_model.encode(batch.source), batch.target_L, batch.given_BR)
    close(torch.stack(states), soft_golden[f"{case}/lout"].reshape(4, -1, 32))
    close(soft_model.logits(torch.stack(states)), soft_golden[f"{case}/logits"].reshape(4, -1, 60))

    counts = soft_exit.counts(batch)
    soft_model.zero_grad()
    scale = {name: soft_exit.weights[name] / count for name, count in counts.items()}
    total, sums = soft_exit.losses(soft_model, batch, scale)
    close(total, soft_golden[f"{case}/loss"])
    close(torch.stack([sums[name] / counts[name] for name in soft_exit.terms]), soft_golden[f"{case}/losses"])
    total.backward()
    own = dict(soft_model.named_parameters())
    for name, norm in zip(soft_golden["param_names"].tolist(), soft_golden[f"{case}/grad_norms"], strict=True):
        ours = own[OWN_NAMES.get(name, name.removeprefix("model."))].grad
        close(ours.norm(), norm)
        if f"{case}/grad/{name}" in soft_golden:
            theirs = torch.from_numpy(soft_golden[f"{case}/grad/{name}"]).double()
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_soft_exit_writes_as_released_alone_and_in_a_batch(soft_golden, soft_model, soft_exit):
    soft_model.eval()
    examples = soft_examples(soft_golden, "infer")
    with torch.no_grad():
        batch = soft_exit.collate(examples)
        memory = soft_model.encode(batch.source)
        close(memory, soft_golden["infer/encoder_out"][soft_golden["in/source_mask"]])
        final = soft_model.logits(decode_soft(soft_model, batch.rows, memory)[-1])
        close(final, soft_golden["infer/final_logits"].reshape(-1, 60))
        for index, example in enumerate(examples):
            alone = soft_exit.collate([example])
            states = decode_soft(soft_model, alone.rows, soft_model.encode(alone.source))
            close(soft_model.logits(states[-1]), soft_golden[f"infer/final_logits_alone_{index}"])

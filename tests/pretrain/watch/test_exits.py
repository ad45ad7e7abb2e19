"""What the board says of off-ramps: against a plain count over every layer, and calibration by hand."""

import numpy as np
import pytest
import torch

from pretrain.objectives import build, lplm_reference
from pretrain.watch.exits import THRESHOLD, calibration_error, measure
from tests.pretrain.objectives.cases import IDS, examples, fitted, tiny_model
from tests.pretrain.objectives.test_lplm import leaving_at


@pytest.mark.parametrize("name", ["lplm", "hard_exit"])
def test_every_layer_is_measured_as_if_all_left_there(name):
    model = tiny_model(decoder_layers=3)
    model.shared.weight.data.mul_(6)  # sure enough for some to leave early
    objective = build({"name": name, "rows": "longest"}, IDS, None, model.config)
    lplm = build({"name": "lplm", "copies": 1, "rows": "longest"}, IDS, None, model.config)
    given = fitted(objective, examples())
    found, exits = measure(model, objective.collate(given))
    entropies, drawn = [], fitted(lplm, given)
    for layer in (1, 2, 3):
        run = lplm_reference.forward(model, leaving_at(drawn, layer), lplm, 0)
        logits = torch.cat([run.logits_BTV[b, : len(e.target) - 1] for b, e in enumerate(given)]).detach()
        targets = torch.cat([torch.from_numpy(e.target[1:]) for e in given])
        p = logits.softmax(dim=1)
        entropies.append(-(p * p.log()).sum(dim=1))
        assert found[f"exits/accuracy_{layer}"] == pytest.approx(float((logits.argmax(1) == targets).double().mean()))
        assert found[f"exits/confidence_{layer}"] == pytest.approx(float(p.amax(dim=1).mean()))
        assert found[f"exits/entropy_{layer}"] == pytest.approx(float(entropies[-1].mean()))
    early = torch.stack(entropies) < THRESHOLD
    wanted = [next((layer for layer in (1, 2) if early[layer - 1, row]), 3) for row in range(early.shape[1])]
    assert exits.tolist() == wanted and len(set(wanted)) > 1
    assert found["exits/mean_layer"] == pytest.approx(np.mean(wanted))


def test_nothing_to_measure():
    model = tiny_model()
    found, exits = measure(model, build({"name": "lplm"}, IDS, None, model.config).collate([]))
    assert found == {} and not len(exits)


def test_calibration_by_hand():
    sure = torch.tensor([0.95, 0.92, 0.15, 1.0], dtype=torch.float64)
    right = torch.tensor([1.0, 0.0, 1.0, 1.0])
    # bin 9 has three rows, |2 - 2.87|; bin 1 has one, |1 - 0.15|
    assert calibration_error(sure, right) == pytest.approx((0.87 + 0.85) / 4)
    assert calibration_error(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])) == pytest.approx(0.0)

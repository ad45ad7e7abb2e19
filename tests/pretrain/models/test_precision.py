"""16-bit weights: every objective trains and shows what it predicts, with each optional part of the model."""

import pytest
import torch

from pretrain.models.golden import golden
from pretrain.objectives import build
from tests.pretrain.objectives.cases import IDS, SHAPE, examples, fitted, tiny_model, unit_scale

OPTIONS = [{"positions": "sinusoidal"}, {"logits_bias": True}, {"positions": "sinusoidal", "norm": "pre"}, {}]


def in_16_bits(dtype, everything, changes):
    """Weights in `dtype`; buffers too, or in fp32 as the local engine and DeepSpeed leave them."""
    model = tiny_model(**changes).float()
    if everything:
        return model.to(dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: "-".join(map(str, changes.values())) or "plain")
@pytest.mark.parametrize("name", ["janus", "cmlm", "denoise", "lplm", "hard_exit", "soft_exit"])
@pytest.mark.parametrize("everything", [False, True], ids=["weights", "all"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_losses_gradients_and_previews(dtype, allowed, everything, name, changes):
    changes = {**changes, "soft_exit": name == "soft_exit"}
    model, exact = in_16_bits(dtype, everything, changes), tiny_model(**changes)
    if exact.head.bias_V is not None:
        for one in (model, exact):
            one.head.bias_V.copy_(torch.linspace(-1, 1, len(one.head.bias_V)))
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    given = {"given": 1.0} if name == "soft_exit" else {}  # an argmax in 16 bits may be another
    objective = build({"name": name, **given}, IDS, None, SHAPE)
    batch = objective.collate(fitted(objective, examples()))
    scale = unit_scale(objective, batch)
    totals = []
    for one in (model, exact):
        total, _ = objective.losses(one, batch, scale)
        total.backward()
        totals.append(float(total.detach()))
    assert totals[0] == pytest.approx(totals[1], rel=allowed)
    for (key, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == dtype
        assert (ours.grad.double() - theirs.grad).norm() <= 3 * allowed * theirs.grad.norm() + 5e-3, key
    shown, expected = (objective.preview(one, batch, limit=4) for one in (model, exact))
    assert [preview.target for preview in shown] == [preview.target for preview in expected]
    assert [list(preview.predicted) for preview in shown] == [list(preview.predicted) for preview in expected]


@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: "-".join(map(str, changes.values())) or "plain")
def test_logits_of_every_mode(changes):
    changes = {**changes, "soft_exit": True}
    model, exact = in_16_bits(torch.bfloat16, False, changes), tiny_model(**changes)
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    layout = build({"name": "janus"}, IDS, None, SHAPE).layout
    ours, theirs = (golden(one, layout, ("ar", "nar", "causal", "hard_exit")) for one in (model, exact))
    for name, value in theirs.items():
        assert (ours[name].double() - value).norm() <= 0.05 * value.double().norm(), name

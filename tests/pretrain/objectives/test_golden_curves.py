"""Twenty steps of each objective in float64 on synthetic text: a refactor keeps these curves to the ninth digit.

`make goldens` writes them anew; a change needs a reason in its commit message.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.objectives import build
from tests.pretrain.objectives.cases import IDS, SHAPE, WHOLE, tiny_model, unit_scale

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
STEPS, SAMPLES = 20, 4
OPTIONS = {"janus": {"weights": {"length": 0.1}}, "soft_exit": {"given": 0.3}}


def synthetic_text(rng):
    """A walk over the vocabulary: each token is near the one before, so there is something to learn."""
    n = int(rng.integers(4, 14))
    return 5 + (rng.integers(32) + np.cumsum(rng.integers(0, 3, n))) % 32


def curve(name):
    rng = np.random.default_rng(11)
    objective = build({"name": name, **OPTIONS.get(name, {})}, IDS, None, SHAPE)
    model = tiny_model(seed=5, soft_exit=name == "soft_exit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    losses = []
    for _ in range(STEPS):
        batch = objective.collate([objective.corrupt(synthetic_text(rng), WHOLE, rng) for _ in range(SAMPLES)])
        optimizer.zero_grad()
        total, _ = objective.losses(model, batch, unit_scale(objective, batch))
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    return losses


@pytest.mark.parametrize("name", ["janus", "cmlm", "denoise", "lplm", "hard_exit", "soft_exit", "cmlm_corr", "rdrop"])
def test_curve(name, request):
    losses, file = curve(name), GOLDENS / f"{name}.txt"
    if request.config.getoption("--update-goldens"):
        file.write_text("".join(f"{step} {loss:.12f}\n" for step, loss in enumerate(losses)), encoding="utf-8")
    expected = [float(line.split()[1]) for line in file.read_text(encoding="utf-8").splitlines()]
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])

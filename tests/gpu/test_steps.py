"""Whole training steps on the kernels: loss and gradients as PyTorch's operators give them."""

import numpy as np
import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder, SpecialIds
from pretrain.objectives import build
from pretrain.objectives.base import Example
from pretrain.objectives.lplm import ExitExample

pytestmark = pytest.mark.gpu
IDS = SpecialIds(bos=0, pad=1, eos=2, mask=4, unk=3)
CONFIG = ModelConfig(
    vocab_size=1003, d_model=128, encoder_layers=2, decoder_layers=3, heads=2, ffn_dim=128, dropout=0.0,
    attention_dropout=0.0, length_classes=80,
)  # fmt: skip


def examples(name):
    random, made = np.random.default_rng(0), []
    for n in (3, 17, 40, 66):
        source, target = (np.concatenate([[0], random.integers(5, 1003, n - 2), [2]]) for _ in range(2))
        if name == "lplm":
            made.append(ExitExample(source, target, np.empty(0, np.int64), random.integers(1, 4, (2, n - 1))))
        else:
            made.append(Example(source, target, np.sort(1 + random.permutation(n - 2)[: n // 2])))
    return made


def step(device, name, backend, dtype):
    """Loss and all gradients as one vector."""
    torch.manual_seed(0)
    model = EncoderDecoder(CONFIG, IDS, backend=backend).to(device, dtype).train()
    options = {"name": name, **({"copies": 2} if name == "lplm" else {})}
    objective = build(options, IDS, None, CONFIG)
    batch = objective.collate(examples(name)).to(device)
    scale = {term: objective.weights[term] / max(1, n) for term, n in objective.counts(batch).items()}
    total, _ = objective.losses(model, batch, scale)
    total.backward()
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in model.parameters()]
    return total.detach().double(), torch.cat(parts)


@pytest.mark.parametrize("name", ["janus", "lplm", "denoise"])
def test_a_step_is_as_exact_as_pytorch_s(device, name):
    exact = step(device, name, "torch", torch.float64)
    plain = step(device, name, "torch", torch.bfloat16)
    ours = step(device, name, "cuda", torch.bfloat16)
    for right, theirs, mine in zip(exact, plain, ours, strict=True):
        allowed = 2 * float((theirs - right).norm()) + 2e-3 * float(right.norm())
        assert float((mine - right).norm()) <= allowed


def test_a_step_gives_the_same_bits_twice(device):
    for a, b in zip(*(step(device, "janus", "cuda", torch.bfloat16) for _ in range(2)), strict=True):
        assert torch.equal(a, b)

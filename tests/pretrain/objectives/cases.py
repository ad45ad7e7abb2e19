"""Small texts and models for the objective tests."""

from typing import NamedTuple

import numpy as np
import torch

from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder, SpecialIds
from pretrain.objectives import Example

IDS = SpecialIds(bos=0, pad=1, eos=2, mask=4, unk=3)
VOCAB = 37
SHAPE = ModelConfig(decoder_layers=2, length_classes=24, soft_exit=True)
WHOLE = np.zeros(1, np.int32)  # a text of one sentence


def tiny_model(seed=0, **changes):
    options = {
        "vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "heads": 2, "ffn_dim": 24,
        "max_positions": 64, "dropout": 0.0, "attention_dropout": 0.0, "length_classes": 24, "init_std": 0.3,
    }  # fmt: skip
    torch.manual_seed(seed)
    return EncoderDecoder(ModelConfig(**{**options, **changes}), IDS).double()


def examples(seed=0, sizes=((5, 7, 3), (3, 4, 0), (8, 6, 6), (2, 9, 1))):
    """Examples of (source length, content length, masked tokens); none and all masked are among them."""
    rng = np.random.default_rng(seed)
    made = []
    for source, n, masked in sizes:
        text = [np.concatenate([[IDS.bos], rng.integers(5, VOCAB, k), [IDS.eos]]) for k in (source, n)]
        made.append(Example(text[0], text[1], np.sort(1 + rng.permutation(n)[:masked])))
    return made


def fitted(objective, given, seed=0):
    """`given` as the objective wants it: some draw more than which tokens are masked."""
    if not {"hard_exit", "soft_exit"} & set(objective.modes):
        return given
    rng = np.random.default_rng(seed)
    return [objective.corrupt_pair(example.source, example.target, rng) for example in given]


def unit_scale(objective, batch):
    return {name: weight / max(1, objective.counts(batch)[name]) for name, weight in objective.weights.items()}


class Outcome(NamedTuple):
    """A loss, its terms by name, and the gradient of every parameter by name."""

    total: torch.Tensor
    sums: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]

    def assert_equal(self, plain, names=None):
        """names: {term: its name in `plain`}; None: the same, all of them.

        The largest gradient says how far rounding may move the smaller ones that were made from it.
        """
        torch.testing.assert_close(self.total, plain.total, rtol=1e-10, atol=0)
        for name, other in (names or {name: name for name in plain.sums}).items():
            torch.testing.assert_close(self.sums[name], plain.sums[other], rtol=1e-10, atol=1e-12)
        atol = 1e-11 * max(1.0, *(float(gradient.abs().max()) for gradient in plain.gradients.values()))
        for name, gradient in plain.gradients.items():
            found = self.gradients[name]
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def loss_and_gradients(model, losses):
    model.zero_grad()
    total, sums = losses()
    total.backward()
    return Outcome(total.detach(), sums, {n: p.grad.clone() for n, p in model.named_parameters()})

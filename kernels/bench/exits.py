"""LPLM steps: k permutations at once, against k passes in which every row goes through every layer."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from harness import Row, medians, require
from steps import IDS, compare, step
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder
from pretrain.objectives import build, lplm_reference
from pretrain.objectives.batch import TokenBatch
from pretrain.objectives.lplm import ExitExample, Lplm

CONFIG = ModelConfig(
    vocab_size=4096, encoder_layers=6, decoder_layers=6, dropout=0.0, attention_dropout=0.0, length_classes=8
)
SAMPLES, LENGTH, REPEATS = 4, 128, 5


def rows() -> list[Row]:
    """`lplm_k10`, `lplm_k10_decoder` and `lplm_k1_decoder`."""
    torch.manual_seed(0)
    model = EncoderDecoder(CONFIG, IDS).train()
    off = _agreement(EncoderDecoder(CONFIG, IDS).double().train())
    ten, one = _objective(10), _objective(1)
    given = _texts(10)
    fast, slow = ten.collate(given), [one.collate(_through_every_layer(given)) for _ in range(10)]
    compare(model, lambda: step(model, ten, fast), lambda: _reference_step(model, ten, fast, given), 1e-5)
    whole, naive = medians(
        [lambda: step(model, ten, fast), _each(lambda batch: step(model, one, batch), slow)], REPEATS
    )
    shape = f"d=256, 6+6 layers, V=4096, B={SAMPLES}, S=T={LENGTH}; gradients agree to {off:.1e} in fp64"
    made = [Row("lplm_k10", whole / naive, 0.52, "max", f"{whole * 1e3:.0f} ms over {naive * 1e3:.0f} ms; {shape}")]
    once = one.collate(_texts(1))
    for name, batch, others, target in (
        ("lplm_k10_decoder", fast, slow, 0.5),
        ("lplm_k1_decoder", once, slow[:1], 0.72),
    ):
        ours, theirs = _decoder(model, batch), [_decoder(model, other) for other in others]
        quick, plain = medians([ours, _each(lambda run: run(), theirs)], REPEATS)
        detail = f"{quick * 1e3:.0f} ms over {plain * 1e3:.0f} ms; the decoder's forward and backward alone"
        made.append(Row(name, quick / plain, target, "max", detail))
    return made


def _objective(copies: int) -> Lplm:
    made = build({"name": "lplm", "copies": copies}, IDS, None, CONFIG)
    assert isinstance(made, Lplm)
    return made


def _texts(copies: int, samples: int = SAMPLES, length: int = LENGTH) -> list[ExitExample]:
    """Random texts whose decoder has `length` rows, each with layers of its own."""
    rng, made = np.random.default_rng(0), []
    for _ in range(samples):
        source, target = (
            np.concatenate([[IDS.bos], rng.integers(5, 4096, n - 2), [IDS.eos]]) for n in (length, length + 1)
        )
        exits = rng.integers(1, CONFIG.decoder_layers + 1, (copies, length))
        made.append(ExitExample(source, target, np.empty(0, np.int64), exits))
    return made


def _through_every_layer(given: Sequence[ExitExample]) -> list[ExitExample]:
    """The same texts, one copy, computed to the top."""
    top = CONFIG.decoder_layers
    return [ExitExample(e.source, e.target, e.masked, np.full_like(e.exits[:1], top)) for e in given]


def _agreement(precise: EncoderDecoder) -> float:
    """Relative difference of the gradients of a small batch and of its reference in float64; refuses if too large."""
    objective, given = _objective(10), _texts(10, samples=2, length=24)
    batch = objective.collate(given)
    return compare(
        precise,
        lambda: step(precise, objective, batch),
        lambda: _reference_step(precise, objective, batch, given),
        1e-10,
    )


def _reference_step(model: EncoderDecoder, objective: Lplm, batch: TokenBatch, given: Sequence[ExitExample]) -> Tensor:
    model.zero_grad(set_to_none=True)
    scale = {t: objective.weights[t] / max(1, n) for t, n in objective.counts(batch).items()}
    total, _ = lplm_reference.losses(model, given, objective, scale)
    total.backward()
    return total.detach()


def _decoder(model: EncoderDecoder, batch: TokenBatch) -> Callable[[], None]:
    """Forward and backward of the decoder from the encoder's output to the states that leave."""
    with torch.no_grad():
        memory_MD = model.encode(batch.source)
        upstream_ND = torch.randn_like(model.decode(batch.rows, memory_MD))
    require(bool(upstream_ND.isfinite().all()), "the states must be finite")

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model.decode(batch.rows, memory_MD.requires_grad_()).backward(upstream_ND)

    return run


def _each(run: Callable[..., object], over: Sequence[object]) -> Callable[[], None]:
    def all_of_them() -> None:
        for one in over:
            run(one)

    return all_of_them

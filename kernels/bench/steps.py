"""Training steps: JANUS over plain AR, the plain reference over the packed JANUS, padded rows over packed rows."""

from collections.abc import Callable

import numpy as np
import torch
from harness import Row, medians, require
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.models import DecoderRows, EncoderDecoder, SourceRows, SpecialIds, Stream, VocabTargets, pack_streams
from pretrain.objectives import Example, Objective, build, janus_reference
from pretrain.objectives.batch import TokenBatch

IDS = SpecialIds(bos=0, pad=1, eos=2, mask=4, unk=3)
CONFIG = ModelConfig(vocab_size=8192, dropout=0.0, attention_dropout=0.0)
SAMPLES, LENGTH, REPEATS = 16, 128, 7


def examples(lengths: list[int], rng: np.random.Generator) -> list[Example]:
    """Random texts; half of each target is masked, source and target are equally long."""
    made = []
    for n in lengths:
        text = [np.concatenate([[IDS.bos], rng.integers(5, 8192, n - 2), [IDS.eos]]) for _ in range(2)]
        masked = np.sort(1 + rng.permutation(n - 2)[: n // 2])
        made.append(Example(text[0], text[1], masked))
    return made


def step(model: EncoderDecoder, objective: Objective, batch: TokenBatch) -> Tensor:
    """Loss and gradients of one micro-batch, every term divided by its own count."""
    model.zero_grad(set_to_none=True)
    counts = objective.counts(batch)
    total, _ = objective.losses(model, batch, {t: objective.weights[t] / max(1, n) for t, n in counts.items()})
    total.backward()
    return total.detach()


def reference_step(model: EncoderDecoder, objective: Objective, batch: TokenBatch, given: list[Example]) -> Tensor:
    """The same update by the plain reference."""
    model.zero_grad(set_to_none=True)
    scale = {t: objective.weights[t] / max(1, n) for t, n in objective.counts(batch).items()}
    total, _ = janus_reference.losses(model, given, objective.layout, scale, 0.0)
    total.backward()
    return total.detach()


def gradients(model: EncoderDecoder) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def compare(model: EncoderDecoder, one: Callable[[], Tensor], other: Callable[[], Tensor], tolerance: float) -> float:
    """Relative difference of the gradients of two ways to compute a step; refuses if it or the loss is too far off."""
    loss, grad = one(), gradients(model)
    loss_other, grad_other = other(), gradients(model)
    off = float((grad - grad_other).norm() / grad_other.norm())
    require(off <= tolerance, f"gradients must agree to {tolerance:g}, got {off:.2e}")
    require(abs(float(loss / loss_other) - 1) <= tolerance, f"losses must agree, got {loss} and {loss_other}")
    return off


def janus_rows() -> list[Row]:
    """`janus_over_ar` and `reference_over_packed`, on the same texts in one run."""
    torch.manual_seed(0)
    given = examples([LENGTH] * SAMPLES, np.random.default_rng(0))
    model = EncoderDecoder(CONFIG, IDS).train()
    janus = build({"name": "janus"}, IDS, None, CONFIG)
    denoise = build({"name": "denoise", "ar_layout": "bos_first"}, IDS, None, CONFIG)
    packed, plain = janus.collate(given), denoise.collate(given)

    precise = EncoderDecoder(CONFIG, IDS).double().train()
    few = given[:4]
    few_packed = janus.collate(few)
    off64 = compare(
        precise,
        lambda: step(precise, janus, few_packed),
        lambda: reference_step(precise, janus, few_packed, few),
        1e-10,
    )
    off32 = compare(
        model, lambda: step(model, janus, packed), lambda: reference_step(model, janus, packed, given), 1e-5
    )
    both = [
        lambda: step(model, janus, packed),
        lambda: step(model, denoise, plain),
        lambda: reference_step(model, janus, packed, given),
    ]
    t_janus, t_ar, t_reference = medians(both, REPEATS)
    shape = f"d=256, 3+3 layers, V=8192, B={SAMPLES}, S=T={LENGTH}, half masked"
    return [
        Row("janus_over_ar", t_janus / t_ar, 2.6, "max", f"{t_janus * 1e3:.0f} ms over {t_ar * 1e3:.0f} ms; {shape}"),
        Row(
            "reference_over_packed",
            t_reference / t_janus,
            1.9,
            "min",
            f"{t_reference * 1e3:.0f} ms over {t_janus * 1e3:.0f} ms; gradients agree to {off32:.1e} in fp32, "
            f"{off64:.1e} in fp64; {shape}",
        ),
    ]


def padded_row() -> Row:
    """A step on rows padded to the longest sample over the packed step, log-normal lengths."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    mean, sigma = 64.0, 0.6
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, 32)
    lengths = [int(n) for n in np.clip(drawn.round(), 4, 512)]
    given = examples(lengths, rng)
    longest = max(lengths)
    fill = sum(lengths) / (longest * len(lengths))
    model = EncoderDecoder(CONFIG, IDS).train()
    denoise = build({"name": "denoise", "ar_layout": "bos_first"}, IDS, None, CONFIG)
    batch = denoise.collate(given)
    padded = _padded(given, longest)
    count = batch.term_counts[0]

    def padded_step() -> Tensor:
        model.zero_grad(set_to_none=True)
        source, rows, targets = padded
        h_LD = model.decode(rows, model.encode(source))
        loss = VocabTargets(*targets, tuple_PK=torch.empty(0, 1, dtype=torch.int64), ce_scale=[1.0 / count, 0.0])
        total = model.head(h_LD, loss)[0]
        total.backward()
        return total.detach()

    off = compare(model, lambda: step(model, denoise, batch), padded_step, 1e-5)
    t_padded, t_packed = medians([padded_step, lambda: step(model, denoise, batch)], REPEATS)
    return Row(
        "padded_over_packed",
        t_padded / t_packed,
        0.85 / fill,
        "min",
        f"{t_padded * 1e3:.0f} ms over {t_packed * 1e3:.0f} ms; fill {fill:.3f}, limit {1 / fill:.2f}; "
        f"gradients agree to {off:.1e}; 32 samples, log-normal lengths, mean 64, sigma 0.6",
    )


def _padded(given: list[Example], longest: int) -> tuple[SourceRows, DecoderRows, tuple[Tensor, Tensor]]:
    """The AR rows of `given` with every source and target padded to `longest`; padding is read by nobody real."""

    def pad(tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([tokens, np.full(longest - len(tokens), IDS.pad)])

    source = SourceRows.pack([pad(e.source) for e in given])
    table = source.mask.table.copy()
    table[:, 3] = [len(e.source) for e in given]
    source = SourceRows(
        source.tokens_R,
        source.positions_R,
        source.sample_R,
        source.n_samples,
        type(source.mask).build(table, len(source.tokens_R)),
    )
    streams = []
    rows = longest - 1
    for index, e in enumerate(given):
        target = pad(e.target)
        memory = (index * longest, len(e.source))
        streams.append(
            Stream(target[:-1], np.arange(rows), [(rows, 1, 1, 0, 0, 0)], memory, (0, rows), target[1:], term=0)
        )
    packed, target_L, _ = pack_streams(streams, source.mask.n_rows)
    return source, packed, (target_L, (target_L == IDS.pad).long())

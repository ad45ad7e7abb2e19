"""Random inputs for the operators, and how far 16 bits may be from float64. Needs no GPU.

Shapes: R rows, K keys, H heads, D head width or width.
"""

import random

import torch

from parlance_kernels import SampleMask

# Relative to the largest number of a tensor: rounding of inputs and probabilities, summed over hundreds of terms.
ALLOWED = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5}


def close(ours, exact, dtype, factor=1.0):
    """Whether every number is finite and as near to float64 as the dtype allows."""
    assert ours.shape == exact.shape
    assert ours.isfinite().all()
    if not ours.numel():
        return
    allowed = factor * ALLOWED[dtype] * max(1e-3, float(exact.abs().max()))
    assert float((ours.double().cpu() - exact.double().cpu()).abs().max()) <= allowed


def mask_of(lengths):
    """Causal rows, rows that read all, and truths and queries of JANUS, for samples (visible, masked).

    Some samples have nothing visible (V=0), some nothing masked (M=0), some no rows at all.
    """
    segments, row, key = [], 0, 0
    for visible, hidden in lengths:
        n = visible + hidden
        kinds = [(n, 1, 1, 0, 0, 0), (n, n, 0, 0, 0, 0)]
        kinds += [(hidden, visible, 0, visible + 1, 1, hidden), (hidden, visible, 0, visible, 1, hidden)]
        for rows, *fields in kinds:
            if rows:
                segments.append((row, rows, key, *fields))
                row += rows
        key += n + hidden
    return SampleMask.build(segments, key)


EDGES = [(0, 1), (1, 0), (0, 0), (0, 17), (64, 64), (1, 63), (65, 0), (3, 1), (0, 0)]


def lengths_of(seed, most, samples):
    """Every edge, and `samples` random (visible, masked) up to `most` tokens."""
    draw = random.Random(seed)
    drawn = []
    for _ in range(samples):
        n = draw.randint(1, most)
        hidden = draw.randint(0, n)
        drawn.append((n - hidden, hidden))
    made = EDGES + drawn
    draw.shuffle(made)
    return made


def states(shape, dtype, device, seed, scale=1.0):
    """The same numbers on every device."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(device, dtype)


def indices(device, *values):
    """int64 tensors on the device."""
    return [torch.as_tensor(value, dtype=torch.int64).to(device) for value in values]


def vocab_problem(device, dtype, tuples, streams, plain, vocabulary, width, seed, bias=False):
    """Arguments of `vocab_loss` beside h, weight and bias."""
    make = torch.Generator().manual_seed(seed)
    rows = tuples * streams + plain
    tensors = [states((n, width), dtype, device, seed + i, 0.5) for i, n in enumerate((rows, vocabulary))]
    tensors.append(states((vocabulary,), dtype, device, seed + 2) if bias else None)
    order = torch.randperm(rows, generator=make)
    target, term = (torch.randint(n, (rows,), generator=make) for n in (vocabulary, 3))
    index = indices(device, target, term, order[: tuples * streams].view(tuples, streams))
    pairs = {1: (), 2: ((0, 1),), 3: ((0, 2), (1, 2), (0, 1))}[streams]
    arguments = dict(zip(("target_R", "term_R", "tuple_PK"), index, strict=True))
    scales = {"ce_scale": (0.3, 0.0, 1.7), "kl_pairs": pairs, "kl_scale": tuple(0.4 + i for i in range(len(pairs)))}
    return tensors, {**arguments, **scales}


def differentiated(total, given):
    """Gradients of a scalar with respect to those of `given` that are there."""
    return torch.autograd.grad(total, [x for x in given if x is not None])

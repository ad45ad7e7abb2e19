"""Incremental decoding gives the logits of a full forward, on both streams, after any reordering."""

from typing import Literal

import numpy as np
import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder, SourceRows, SpecialIds, pack_streams
from pretrain.models.incremental import IncrementalDecoder, StreamName, decode_over, project_memory
from pretrain.models.patterns import ArLayout, Layout, ar_two_stream, causal, nar

IDS = SpecialIds(bos=0, pad=1, eos=2, mask=4, unk=3)
Norm = Literal["post", "pre"]
Positions = Literal["learned", "sinusoidal"]
VOCAB, LENGTH = 40, 6


def make_model(norm: Norm = "post", positions: Positions = "learned") -> EncoderDecoder:
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=2, decoder_layers=3, heads=2, ffn_dim=32, norm=norm,
        positions=positions, max_positions=16, init_std=0.3,
    )  # fmt: skip
    return EncoderDecoder(config, IDS, backend="torch").double().eval()


def make_sources(rng: np.random.Generator, count: int = 3) -> list[np.ndarray]:
    return [np.array([0, *rng.integers(5, VOCAB, size=3 + 2 * i), 2]) for i in range(count)]


def full_logits(
    model: EncoderDecoder, source: np.ndarray, fed: np.ndarray, layout: ArLayout, stream: StreamName
) -> torch.Tensor:
    """Logits of every step when `fed` was fed, by one forward over the whole sequence."""
    rows = SourceRows.pack([source])
    memory = model.encode(rows)
    body = fed[1:] if layout.shift == 0 else fed
    target = np.append(body, IDS.eos)
    made = [causal(target, (0, len(source)), layout, 0)]
    if stream == "query":
        made = list(ar_two_stream(target, (0, len(source)), layout, 0))
    packed, _, _ = pack_streams(made, len(source))
    return model.logits(model.decode(packed, memory))


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("stream", ["query", "content"])
@pytest.mark.parametrize(("start", "offset"), [("bos_first", 0), ("bos_first", 1), ("eos_first", 0)])
@torch.no_grad()
def test_incremental_equals_full_forward_through_reorders(
    norm: Norm, stream: StreamName, start: Layout, offset: int
) -> None:
    model, rng = make_model(norm), np.random.default_rng(0)
    layout, sources = ArLayout(start, offset, IDS), make_sources(rng)
    state = IncrementalDecoder(model, SourceRows.pack(sources), layout, stream, LENGTH, capacity=7)
    owner: list[int] = [0, 1, 2]
    fed: list[list[int]] = [[], [], []]
    for step in range(LENGTH):
        tokens = rng.integers(5, VOCAB, size=len(owner))
        if step < len(layout.start):
            tokens[:] = layout.start[step]
        for history, token in zip(fed, tokens, strict=True):
            history.append(int(token))
        logits = state.step(torch.from_numpy(tokens))
        for n, o in enumerate(owner):
            expected = full_logits(model, sources[o], np.array(fed[n]), layout, stream)[-1]
            torch.testing.assert_close(logits[n], expected, rtol=0, atol=1e-10)
        # grows to the capacity, shrinks, permutes, repeats and crosses sources
        chosen = rng.integers(0, len(owner), size=int(rng.integers(1, 8)))
        state.reorder(torch.from_numpy(chosen))
        owner, fed = [owner[i] for i in chosen], [list(fed[i]) for i in chosen]
    with pytest.raises(ValueError, match="6 tokens"):
        state.step(torch.zeros(len(owner), dtype=torch.int64))


@torch.no_grad()
def test_the_identity_reorder_and_sinusoidal_positions() -> None:
    model, rng = make_model(positions="sinusoidal"), np.random.default_rng(1)
    layout, sources = ArLayout.aligned("bos_first", IDS), make_sources(rng)
    state = IncrementalDecoder(model, SourceRows.pack(sources), layout, "query", LENGTH, capacity=3)
    fed = np.concatenate([np.zeros((1, 3), np.int64), rng.integers(5, VOCAB, size=(4, 3))])
    for tokens in fed:
        logits = state.step(torch.from_numpy(tokens))
        state.reorder(torch.arange(3))
    for n in range(3):
        expected = full_logits(model, sources[n], fed[:, n], layout, "query")[-1]
        torch.testing.assert_close(logits[n], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["post", "pre"])
@torch.no_grad()
def test_decoding_over_a_projected_memory_is_decoding(norm: Norm) -> None:
    model, rng = make_model(norm), np.random.default_rng(2)
    source = SourceRows.pack(make_sources(rng))
    memory = model.encode(source)
    target = np.array([0, 7, 8, 9, 10, 2])
    streams = [nar(target, np.array([1, 3]), source.memory_range(i), IDS.mask, 0) for i in range(3)]
    streams += ar_two_stream(target, source.memory_range(1), ArLayout.aligned("bos_first", IDS), 0)
    rows, _, _ = pack_streams(streams, len(memory))
    expected = model.decode(rows, memory)
    assert torch.equal(decode_over(model, rows, project_memory(model, memory)), expected)


def test_capacity_and_positions_are_checked() -> None:
    model, source = make_model(), SourceRows.pack(make_sources(np.random.default_rng(0)))
    layout = ArLayout.aligned("bos_first", IDS)
    with torch.no_grad():
        state = IncrementalDecoder(model, source, layout, "query", 4, capacity=3)
        with pytest.raises(ValueError, match="at most 3 hypotheses"):
            state.reorder(torch.zeros(4, dtype=torch.int64))
        with pytest.raises(ValueError, match="at most 16 positions"):
            IncrementalDecoder(model, source, layout, "query", 17, capacity=3)

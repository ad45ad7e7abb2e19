"""Beam search against exhaustive search, greedy against a loop over full forwards, and batch independence."""

import inspect
from itertools import product

import numpy as np
import pytest
import torch

from finetune.decoding import ArDecoding, beam_search
from pretrain.errors import ConfigError
from pretrain.models import EncoderDecoder, pack_streams
from pretrain.models.incremental import StreamName
from pretrain.models.patterns import ArLayout, Layout, ar_two_stream, causal
from tests.finetune.models import IDS, SPECIAL, pack, some_sources, tiny_model

LAYOUTS: list[tuple[Layout, StreamName]] = [("bos_first", "query"), ("eos_first", "query"), ("eos_first", "content")]


def favour_eos(model: EncoderDecoder) -> None:
    """Random models rarely end; these do, after different numbers of tokens."""
    model.head.bias_V = torch.zeros(len(model.shared.weight), dtype=torch.float64)
    model.head.bias_V[IDS.eos] = 4.0


@torch.no_grad()
def log_probabilities(
    model: EncoderDecoder, source: np.ndarray, text: list[int], layout: ArLayout, stream: StreamName
) -> torch.Tensor:
    """[len(text) + 1, V]: of every token of the text and of what follows it, by one full forward."""
    target, memory = np.array([IDS.bos, *text, IDS.eos]), (0, len(source))
    streams = (
        list(ar_two_stream(target, memory, layout, 0)) if stream == "query" else [causal(target, memory, layout, 0)]
    )
    packed, _, _ = pack_streams(streams, len(source))
    logits = model.logits(model.decode(packed, model.encode(pack([source]))))
    return logits.log_softmax(dim=1)[-len(text) - 1 :]


@pytest.mark.parametrize(("start", "stream"), LAYOUTS)
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_is_exhaustive_search(start: Layout, stream: StreamName, penalty: float) -> None:
    model, layout = tiny_model(vocab=8), ArLayout.aligned(start, IDS)
    sources = some_sources((2, 4, 3), vocab=8)
    found = beam_search(
        model, pack(sources), layout, stream, ArDecoding(beam=200, length_penalty=penalty, max_length=5)
    )
    for source, tokens, score in zip(sources, found.tokens, found.scores, strict=True):
        scored = {}
        for text in (list(text) for n in range(4) for text in product((5, 6, 7), repeat=n)):
            log_p = log_probabilities(model, source, text, layout, stream)
            total = sum(float(log_p[i, token]) for i, token in enumerate([*text, IDS.eos]))
            scored[tuple(text)] = total / (len(text) + 1) ** penalty
        best = max(scored, key=lambda text: scored[text])
        assert tuple(tokens) == best
        assert score == pytest.approx(scored[best], abs=1e-10)


@pytest.mark.parametrize(("start", "stream"), LAYOUTS)
def test_a_beam_of_one_is_greedy(start: Layout, stream: StreamName) -> None:
    model, layout = tiny_model(), ArLayout.aligned(start, IDS)
    favour_eos(model)
    sources = some_sources()
    found = beam_search(model, pack(sources), layout, stream, ArDecoding(beam=1, max_length=12))
    ended = 0
    for source, tokens in zip(sources, found.tokens, strict=True):
        text: list[int] = []
        while len(text) < 10:
            log_p = log_probabilities(model, source, text, layout, stream)[-1]
            log_p[[IDS.bos, IDS.pad, IDS.mask, IDS.unk]] = -torch.inf
            token = int(log_p.argmax())
            if token == IDS.eos:
                ended += 1
                break
            text.append(token)
        assert tokens.tolist() == text
    longest = max(len(tokens) for tokens in found.tokens)
    assert found.passes == min(longest + 1, 11) + len(layout.start) - 1


def test_special_tokens_are_never_written_even_when_likeliest() -> None:
    model = tiny_model()
    model.head.bias_V = torch.zeros(40, dtype=torch.float64)
    model.head.bias_V[list(SPECIAL)] = 50.0
    model.head.bias_V[IDS.eos] = 0.0
    found = beam_search(
        model, pack(some_sources()), ArLayout.aligned("bos_first", IDS), "query", ArDecoding(max_length=10)
    )
    assert not any(set(SPECIAL) & set(tokens.tolist()) for tokens in found.tokens)


@pytest.mark.parametrize(("start", "stream"), LAYOUTS)
def test_other_sentences_and_their_order_do_not_matter(start: Layout, stream: StreamName) -> None:
    model, layout, sources = tiny_model(seed=4), ArLayout.aligned(start, IDS), some_sources()
    favour_eos(model)
    options = ArDecoding(beam=3, max_length=14)
    together = beam_search(model, pack(sources), layout, stream, options)
    backwards = beam_search(model, pack(sources[::-1]), layout, stream, options)
    assert len({len(tokens) for tokens in together.tokens}) > 1
    for i, source in enumerate(sources):
        alone = beam_search(model, pack([source]), layout, stream, options)
        assert alone.tokens[0].tolist() == together.tokens[i].tolist() == backwards.tokens[-1 - i].tolist()
        assert alone.scores[0] == pytest.approx(together.scores[i], abs=1e-10)


def test_it_takes_no_reference_and_leaves_the_model_as_it_was() -> None:
    assert list(inspect.signature(beam_search).parameters) == ["model", "source", "layout", "stream", "options"]
    model = tiny_model().train()
    layout = ArLayout.aligned("bos_first", IDS)
    first = beam_search(model, pack(some_sources()), layout, "query", ArDecoding(max_length=6))
    again = beam_search(model, pack(some_sources()), layout, "query", ArDecoding(max_length=6))
    assert model.training  # dropout was off inside all the same
    assert [t.tolist() for t in first.tokens] == [t.tolist() for t in again.tokens]


def test_edges() -> None:
    model, layout = tiny_model(), ArLayout.aligned("bos_first", IDS)
    assert beam_search(model, pack([]), layout, "query", ArDecoding()).tokens == []
    shortest = beam_search(model, pack(some_sources()), layout, "query", ArDecoding(max_length=3))
    assert all(len(tokens) <= 1 for tokens in shortest.tokens)
    with pytest.raises(ConfigError, match="64 positions, got 65"):
        beam_search(model, pack(some_sources()), layout, "query", ArDecoding(max_length=65))

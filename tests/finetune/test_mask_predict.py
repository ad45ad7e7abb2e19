"""Mask-predict: schedule, passes, batch independence, and a slow reference that follows the definition."""

import inspect
import math
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.decoding import MaskPredictOptions, mask_predict
from finetune.decoding.length import LengthChoice, candidate_lengths
from finetune.decoding.mask_predict import hidden_count
from pretrain.errors import ConfigError
from pretrain.models import EncoderDecoder, pack_streams
from pretrain.models.patterns import nar
from tests.finetune.models import IDS, SPECIAL, pack, some_sources, tiny_model


def schedule(content: int, total: int) -> list[int]:
    return [hidden_count(content, done, total) for done in range(1, total)]


def test_the_schedule_of_the_golden_facts() -> None:
    assert schedule(10, 10) == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert schedule(10, 11) == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert schedule(10, 4) == [7, 5, 2]
    assert schedule(7, 4) == [5, 3, 1]


@given(content=st.integers(0, 2000), total=st.integers(1, 200), data=st.data())
def test_the_schedule_is_the_exact_floor(content: int, total: int, data: st.DataObject) -> None:
    done = data.draw(st.integers(1, total))
    assert hidden_count(content, done, total) == math.floor(Fraction(content * (total - done), total))
    assert hidden_count(np.array([content]), done, total)[0] == hidden_count(content, done, total)


@torch.no_grad()
def reference(
    model: EncoderDecoder,
    source: np.ndarray,
    length: int,
    iterations: int,
    early_stop: bool = False,
    rewrite_all: bool = False,
) -> tuple[list[int], float]:
    """One candidate by the definition, token by token, through a full forward per pass."""
    memory = model.encode(pack([source]))
    tokens, scores = np.array([IDS.bos, *[IDS.mask] * (length - 2), IDS.eos]), np.zeros(length)
    masked, total = np.arange(1, length - 1), iterations + 1
    for done in range(1, total + 1):
        before = tokens.copy()
        written = np.arange(1, length - 1) if rewrite_all else masked
        if len(written):
            stream = nar(tokens, masked, (0, len(source)), IDS.mask, 0)
            stream.used, stream.targets = (0, length), tokens
            packed, _, _ = pack_streams([stream], len(source))
            log_p = model.logits(model.decode(packed, memory)).log_softmax(dim=1)
            row_of = {int(position): row for row, position in enumerate(stream.positions)}
            for position in written:
                allowed = log_p[row_of[int(position)]].clone()
                allowed[list(SPECIAL)] = -torch.inf
                tokens[position], scores[position] = int(allowed.argmax()), float(allowed.max())
        if early_stop and done > 1 and (tokens == before).all():
            break
        content = sorted(range(1, length - 1), key=lambda i: (scores[i], i))
        masked = np.sort(np.array(content[: hidden_count(length - 2, done, total)], dtype=np.int64))
    return tokens[1:-1].tolist(), scores.sum() / length


@pytest.mark.parametrize("iterations", [0, 1, 4, 10])
@pytest.mark.parametrize(("choice", "early_stop"), [("contiguous", False), ("topk", True)])
@pytest.mark.parametrize("rewrite", ["hidden", "all"])
def test_it_follows_the_definition(
    iterations: int, choice: LengthChoice, early_stop: bool, rewrite: Literal["hidden", "all"]
) -> None:
    model, sources = tiny_model(seed=1), some_sources()
    options = MaskPredictOptions(
        iterations=iterations,
        length_beam=3,
        length_choice=choice,
        max_length=20,
        early_stop=early_stop,
        rewrite=rewrite,
    )
    found = mask_predict(model, pack(sources), options)
    with torch.no_grad():
        rows = pack(sources)
        lengths = candidate_lengths(model.length_logits(model.encode(rows), rows), 3, choice, 20)
    for i, source in enumerate(sources):
        tried = [reference(model, source, int(n), iterations, early_stop, rewrite == "all") for n in lengths[i]]
        text, score = max(tried, key=lambda one: one[1])
        assert found.tokens[i].tolist() == text
        assert found.scores[i] == pytest.approx(score, abs=1e-10)


@pytest.mark.parametrize("iterations", [0, 1, 4, 10])
def test_passes_are_iterations_plus_one(iterations: int) -> None:
    model, calls = tiny_model(), []
    model.decoder.layers[0].get_submodule("feed_forward").register_forward_hook(lambda *_: calls.append(1))
    found = mask_predict(model, pack(some_sources()), MaskPredictOptions(iterations=iterations))
    assert found.passes == len(calls) == iterations + 1


def test_early_stop_saves_passes() -> None:
    model = tiny_model()
    options = MaskPredictOptions(iterations=200, early_stop=True)
    assert mask_predict(model, pack(some_sources()), options).passes < 201


def test_other_sentences_and_their_order_do_not_matter() -> None:
    model, sources = tiny_model(seed=2), some_sources()
    for early_stop in (False, True):
        options = MaskPredictOptions(iterations=5, length_beam=4, early_stop=early_stop)
        together = mask_predict(model, pack(sources), options)
        backwards = mask_predict(model, pack(sources[::-1]), options)
        assert len({len(tokens) for tokens in together.tokens}) > 1
        for i, source in enumerate(sources):
            alone = mask_predict(model, pack([source]), options)
            assert alone.tokens[0].tolist() == together.tokens[i].tolist() == backwards.tokens[-1 - i].tolist()
            assert alone.scores[0] == pytest.approx(together.scores[i], abs=1e-10)


def test_special_tokens_are_never_written_even_when_likeliest() -> None:
    model = tiny_model()
    model.head.bias_V = torch.zeros(40, dtype=torch.float64)
    model.head.bias_V[list(SPECIAL)] = 50.0
    found = mask_predict(model, pack(some_sources()), MaskPredictOptions())
    assert not any(set(SPECIAL) & set(tokens.tolist()) for tokens in found.tokens)


def test_it_takes_no_reference() -> None:
    assert list(inspect.signature(mask_predict).parameters) == ["model", "source", "options"]


def test_edges() -> None:
    model = tiny_model()
    assert mask_predict(model, pack([]), MaskPredictOptions()).tokens == []
    shortest = mask_predict(model, pack(some_sources()), MaskPredictOptions(max_length=3))
    assert {len(tokens) for tokens in shortest.tokens} <= {0, 1}
    with pytest.raises(ConfigError, match="64 positions, got 65"):
        mask_predict(model, pack(some_sources()), MaskPredictOptions(max_length=65))


def logits_for(*best_first: int, classes: int = 12) -> torch.Tensor:
    logits = torch.arange(classes, 0, -1, dtype=torch.float32) - 100.0
    for rank, length in enumerate(best_first):
        logits[length] = 50.0 - rank
    return logits[None]


def test_candidate_lengths() -> None:
    def choose(logits: torch.Tensor, beam: int, choice: LengthChoice, longest: int = 11) -> list[int]:
        return candidate_lengths(logits, beam, choice, longest)[0].tolist()

    assert choose(logits_for(6), 1, "contiguous") == [6]
    assert choose(logits_for(6), 3, "contiguous") == [5, 6, 7]
    assert choose(logits_for(6), 4, "contiguous") == [4, 5, 6, 7]
    assert choose(logits_for(11), 3, "contiguous") == [9, 10, 11]
    assert choose(logits_for(3), 3, "contiguous") == [3, 4, 5]
    assert choose(logits_for(2), 3, "contiguous") == [2, 3, 4]  # the empty text only if it is the likeliest
    assert choose(logits_for(9, 4, 2, 7), 3, "topk") == [9, 4, 7]
    assert choose(logits_for(2, 4, 7), 2, "topk") == [2, 4]
    assert choose(logits_for(0, 1, 5), 1, "contiguous") == [5]  # classes 0 and 1 hold no target
    assert choose(logits_for(9, 4), 5, "contiguous", longest=6) == [3, 4, 5, 6]

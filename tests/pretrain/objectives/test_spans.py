"""What corruption hides: ratios, bounds and the relation between encoder and decoder."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import ConfigError
from pretrain.models import SpecialIds
from pretrain.objectives import build, spans
from pretrain.objectives.corruption import Corruption, corrupt_text
from pretrain.objectives.janus import PRESETS

IDS = SpecialIds(bos=0, pad=1, eos=2, mask=4, unk=3)


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0.5, 6), st.integers(0, 999))
@settings(max_examples=150, deadline=None)
def test_disjoint_spans_hide_exactly_their_share(n, ratio, mean, seed):
    drawn = spans.disjoint_spans(n, ratio, mean, np.random.default_rng(seed))
    ends = drawn.starts + drawn.lengths
    assert (drawn.starts >= 0).all()
    assert (ends <= n).all()
    assert (ends[:-1] <= drawn.starts[1:]).all()
    assert len(drawn.indices()) == drawn.lengths.sum() == min(n, round(ratio * n))


def test_disjoint_spans_are_spread_evenly():
    rng = np.random.default_rng(0)
    hidden = np.zeros(20)
    for _ in range(4000):
        hidden[spans.disjoint_spans(20, 0.5, 2.0, rng).indices()] += 1
    assert np.abs(hidden / 4000 - 0.5).max() < 0.03


@pytest.mark.parametrize(("n", "expected"), [(10, 0.60), (15, 0.57), (20, 0.57), (30, 0.57), (50, 0.56)])
def test_released_sampler_hides_less_than_its_ratio_and_never_the_edges(n, expected):
    # SYSTEMS A.6 and G 17: mean masked fraction of the content for ratio 0.7 and Poisson(2).
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(3000):
        masked = spans.span_mask(n + 2, 0.7, 2.0, rng)
        assert not len(masked) or (masked[0] > 0 and masked[-1] < n + 1 and (np.diff(masked) > 0).all())
        shares.append(len(masked) / n)
    assert abs(np.mean(shares) - expected) < 0.02


def test_cmlm_sampler_is_uniform():
    rng = np.random.default_rng(0)
    drawn = [spans.uniform_mask(10, rng) for _ in range(20_000)]
    assert abs(np.mean([len(m) / 10 for m in drawn]) - 0.551) < 0.01
    assert {len(m) for m in drawn} == set(range(1, 11))


@given(st.integers(0, 80), st.integers(0, 999), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_decoder_hides_a_superset_of_the_encoder(n, seed, exact, words, insertions):
    rng = np.random.default_rng(seed)
    tokens = np.arange(10, 10 + n)
    options = Corruption(exact=exact, whole_words=words, insertions=insertions)
    example = corrupt_text(tokens, options, IDS, rng.random(100 + n) < 0.4, np.random.default_rng(seed))
    assert example.target.tolist() == [IDS.bos, *tokens.tolist(), IDS.eos]
    shown = set(example.source.tolist()) - {IDS.bos, IDS.eos, IDS.mask}
    hidden = set(example.target[example.masked].tolist())
    assert set(tokens.tolist()) - shown <= hidden
    assert not {IDS.bos, IDS.eos} & hidden
    again = corrupt_text(
        tokens, options, IDS, np.random.default_rng(seed).random(100 + n) < 0.4, np.random.default_rng(seed)
    )
    assert all(np.array_equal(a, b) for a, b in zip(vars(example).values(), vars(again).values(), strict=True))


def test_paper_ratios_are_reached():
    rng = np.random.default_rng(0)
    kept, hidden = [], []
    for _ in range(500):
        example = corrupt_text(np.arange(10, 210), Corruption(), IDS, None, rng)
        kept.append(np.isin(np.arange(10, 210), example.source).sum())
        hidden.append(len(example.masked))
    assert set(hidden) == {100}
    assert abs(1 - np.mean(kept) / 200 - 0.30) < 0.01


@pytest.mark.parametrize("words", [False, True])
def test_released_pretraining_hides_less_than_its_ratio(words):
    # SYSTEMS A.6: about 13 % in the encoder and 27 % in the decoder after overlaps. A plain simulation of the released
    # sampler gives 0.268 and 0.139 for 510 tokens.
    rng = np.random.default_rng(0)
    options = Corruption(**PRESETS["released_pretrain"]["corruption"]).model_copy(update={"whole_words": words})
    assert (options.encoder_ratio, options.decoder_ratio, options.mean_span) == (0.15, 0.3, 3.0)
    tokens, kept, hidden = np.arange(10, 520), [], []
    for _ in range(400):
        example = corrupt_text(tokens, options, IDS, rng.random(520) < 0.7, rng)
        kept.append(np.isin(tokens, example.source).mean())
        hidden.append(len(example.masked) / len(tokens))
    assert abs(np.mean(hidden) - 0.268) < 0.005
    assert abs(1 - np.mean(kept) - 0.139) < 0.006


def test_every_empty_span_inserts_a_mask_or_none_does():
    rng = np.random.default_rng(0)
    inserted = {}
    for insertions in (False, True):
        options = Corruption(encoder_ratio=0.0, decoder_ratio=0.3, mean_span=1.0, insertions=insertions)
        examples = [corrupt_text(np.arange(10, 110), options, IDS, None, rng) for _ in range(100)]
        inserted[insertions] = np.mean([(example.source == IDS.mask).sum() for example in examples])
    # about 30 spans, of which Poisson(1) leaves 37 % empty; all others stay whole in the encoder
    assert inserted[False] == 0 and 9 < inserted[True] < 13


def test_a_span_collapses_to_one_mask():
    drawn = spans.Spans(np.array([1, 4]), np.array([2, 0]))
    assert spans.infill(np.arange(10, 16), drawn, 4).tolist() == [10, 4, 13, 4, 14, 15]


def test_options_contradict_themselves():
    with pytest.raises(ConfigError, match="encoder_ratio"):
        build({"name": "janus", "corruption": {"encoder_ratio": 0.6}}, IDS, None, 256)
    with pytest.raises(ConfigError, match=r"objective\.name.*janus.*'bert'"):
        build({"name": "bert"}, IDS, None, 256)
    with pytest.raises(ConfigError, match="did you mean `preset`"):
        build({"name": "janus", "presett": "paper"}, IDS, None, 256)

"""N-grams, sampling and n-best lists, held against their definitions and against `transformers` on the same weights."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.decoding import ArDecoding, beam_search, sample
from finetune.decoding.left_to_right import repeats
from pretrain.config import validate
from pretrain.errors import ConfigError
from pretrain.models import EncoderDecoder
from pretrain.models.patterns import ArLayout, Layout
from tests.finetune.models import IDS, SPECIAL, pack, some_sources, tiny_model
from tests.finetune.test_beam import LAYOUTS, log_probabilities

BART = ("eos_first", "bos_first")


def talkative(seed: int = 0, eos: float = 2.0, vocab: int = 40, init_std: float = 0.5) -> EncoderDecoder:
    """Texts of different lengths that repeat themselves: a small vocabulary, and EOS somewhat likelier."""
    model = tiny_model(vocab=vocab, seed=seed, init_std=init_std)
    model.head.bias_V = torch.zeros(vocab, dtype=torch.float64)
    model.head.bias_V[IDS.eos] = eos
    return model


def theirs(model: EncoderDecoder, layout: Layout) -> torch.nn.Module:
    """The same weights in transformers, which never writes the tokens that we never write."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    made = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=config.vocab_size, d_model=config.d_model, encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers, encoder_attention_heads=config.heads,
            decoder_attention_heads=config.heads, encoder_ffn_dim=config.ffn_dim, decoder_ffn_dim=config.ffn_dim,
            max_position_embeddings=config.max_positions, forced_bos_token_id=None, forced_eos_token_id=None,
            decoder_start_token_id=IDS.eos if layout == "eos_first" else IDS.bos,
        )
    )  # fmt: skip
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    missing, _ = made.double().load_state_dict(state, strict=False)
    assert all("embed_tokens" in name or name in ("lm_head.weight", "final_logits_bias") for name in missing)
    bias_V = torch.zeros(1, config.vocab_size, dtype=torch.float64)
    made.final_logits_bias.copy_(bias_V if model.head.bias_V is None else model.head.bias_V)
    made.tie_weights()
    return made.eval()


def generated(model: torch.nn.Module, source: np.ndarray, layout: Layout, **options: object) -> list[list[int]]:
    """The texts that transformers writes, without special tokens."""
    told = {"forced_bos_token_id": IDS.bos} if layout == "eos_first" else {}
    never = [[token] for token in (IDS.bos, IDS.pad, IDS.mask, IDS.unk)]
    ids = torch.from_numpy(source)[None]
    with torch.no_grad():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), bad_words_ids=never, early_stopping=True, **told, **options
        )
    return [[token for token in line if token not in SPECIAL] for line in made.tolist()]


# ------------------------------------------------------------------------------------------------------------ n-grams


@given(
    history=st.lists(st.lists(st.integers(5, 8), min_size=12, max_size=12), min_size=1, max_size=4),
    time=st.integers(1, 12),
    size=st.integers(1, 5),
)
def test_repeats_are_the_last_tokens_of_ngrams_that_were_there(history: list[list[int]], time: int, size: int) -> None:
    rows, tokens = repeats(torch.tensor(history)[:, :time], size)
    found = set(zip(rows.tolist(), tokens.tolist(), strict=True))
    expected = set()
    for row, line in enumerate(h[:time] for h in history):
        before = {tuple(line[i : i + size]) for i in range(time - size + 1)}
        expected |= {(row, token) for token in range(5, 9) if (*line[time - size + 1 :], token) in before}
    assert found == expected


@pytest.mark.parametrize(("start", "stream"), LAYOUTS)
@pytest.mark.parametrize("options", [{"beam": 1}, {"beam": 4}, {"sample": True}])
def test_no_ngram_comes_twice(start: str, stream: str, options: dict) -> None:
    model, layout = talkative(eos=0.0, vocab=12), ArLayout.aligned(start, IDS)
    write = sample if "sample" in options else beam_search
    repeated = {}
    for size in (0, 1, 2, 3):
        decoding = ArDecoding(max_length=20, no_repeat_ngram=size, **options)
        texts = write(model, pack(some_sources(vocab=12)), layout, stream, decoding).tokens
        counts = Counter(tuple(text[i : i + (size or 2)]) for text in texts for i in range(len(text) - (size or 2) + 1))
        per_text = [Counter(tuple(t[i : i + (size or 2)]) for i in range(len(t) - (size or 2) + 1)) for t in texts]
        repeated[size] = max((max(c.values(), default=0) for c in per_text), default=0)
        assert counts
    assert repeated[0] > 1, "without the option these models repeat themselves"
    assert repeated[1] == repeated[2] == repeated[3] == 1


# ---------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("start", BART)
@pytest.mark.parametrize("size", [0, 2, 3])
def test_greedy_with_blocked_ngrams_is_that_of_transformers(start: Layout, size: int) -> None:
    model = talkative(seed=5, eos=2.0, vocab=14)
    other, options = theirs(model, start), ArDecoding(beam=1, max_length=30, no_repeat_ngram=size)
    sources = some_sources(vocab=14)
    ours = beam_search(model, pack(sources), ArLayout.aligned(start, IDS), "content", options)
    longest = 31 if start == "eos_first" else 30
    for source, tokens in zip(sources, ours.tokens, strict=True):
        right = generated(other, source, start, max_length=longest, no_repeat_ngram_size=size)[0]
        # at the end we put EOS in place of the last token that is cut off there
        assert tokens.tolist() == right[:28]
    assert len({len(tokens) for tokens in ours.tokens}) > 1


@pytest.mark.parametrize(
    ("start", "penalty"), [("bos_first", 0.0), ("bos_first", 1.0), ("bos_first", 2.0), ("eos_first", 0.0)]
)
@pytest.mark.parametrize(("size", "beam", "n"), [(0, 4, 4), (2, 5, 3), (3, 3, 1)])
def test_the_list_of_a_beam_is_that_of_transformers(
    start: Layout, penalty: float, size: int, beam: int, n: int
) -> None:
    model = talkative(seed=3, eos=-0.5, vocab=14, init_std=0.3)
    other = theirs(model, start)
    options = ArDecoding(beam=beam, n_best=n, max_length=60, no_repeat_ngram=size, length_penalty=penalty)
    sources = some_sources((3, 8, 5, 5, 12, 4, 9), vocab=14)
    ours = beam_search(model, pack(sources), ArLayout.aligned(start, IDS), "content", options)
    assert ours.n_best == n and len(ours.tokens) == n * len(sources)
    compared = []
    for index, source in enumerate(sources):
        right = generated(
            other, source, start, num_beams=beam, num_return_sequences=n, max_length=61, length_penalty=penalty,
            no_repeat_ngram_size=size,
        )  # fmt: skip
        if max(map(len, right)) < 57:  # where a text is cut, rules differ
            assert [tokens.tolist() for tokens in ours.tokens[index * n : (index + 1) * n]] == right
            compared += right
    assert len(compared) >= 4 * n and len({len(text) for text in compared}) > 1


# -------------------------------------------------------------------------------------------------------------- n-best


@pytest.mark.parametrize(("start", "stream"), LAYOUTS)
def test_the_best_are_the_best_of_all_texts(start: Layout, stream: str) -> None:
    """A beam that holds every text of two tokens at most ends with all thirteen in order."""
    model, layout, sources = tiny_model(vocab=8), ArLayout.aligned(start, IDS), some_sources((2, 4), vocab=8)
    found = beam_search(model, pack(sources), layout, stream, ArDecoding(beam=50, n_best=13, max_length=4))
    texts = [[], *([a] for a in (5, 6, 7)), *([a, b] for a in (5, 6, 7) for b in (5, 6, 7))]
    for index, source in enumerate(sources):
        scored = []
        for text in texts:
            log_p = log_probabilities(model, source, text, layout, stream)
            scored.append((sum(float(log_p[i, t]) for i, t in enumerate([*text, IDS.eos])) / (len(text) + 1), text))
        scored.sort(reverse=True)
        mine = slice(index * 13, (index + 1) * 13)
        assert [tokens.tolist() for tokens in found.tokens[mine]] == [text for _, text in scored]
        assert found.scores[mine] == pytest.approx([score for score, _ in scored], abs=1e-10)


def test_where_fewer_texts_exist_empty_ones_fill_up() -> None:
    model, layout = tiny_model(vocab=8), ArLayout.aligned("bos_first", IDS)
    found = beam_search(
        model, pack(some_sources(vocab=8)), layout, "query", ArDecoding(beam=50, n_best=7, max_length=3)
    )
    for index in range(5):
        scores, tokens = found.scores[index * 7 : index * 7 + 7], found.tokens[index * 7 : index * 7 + 7]
        assert sorted(map(tuple, tokens[:4])) == [(), (5,), (6,), (7,)] and np.isfinite(scores[:4]).all()
        assert scores[4:] == [-np.inf] * 3 and not any(map(len, tokens[4:]))


# ------------------------------------------------------------------------------------------------------------ sampling


def drawn(model: EncoderDecoder, source: np.ndarray, n: int, **options: object) -> Counter:
    """How often each first token was drawn, 0 for the end."""
    decoding = ArDecoding(sample=True, n_best=n, max_length=4, **options)
    texts = sample(model, pack([source]), ArLayout.aligned("bos_first", IDS), "query", decoding).tokens
    return Counter(int(text[0]) if len(text) else 0 for text in texts)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 0), (1.0, 3), (1.5, 2)])
def test_tokens_are_drawn_as_often_as_the_model_expects_them(temperature: float, top_k: int) -> None:
    model, source, n = tiny_model(vocab=12, init_std=0.3), some_sources((4,), vocab=12)[0], 4000
    layout = ArLayout.aligned("bos_first", IDS)
    log_p = log_probabilities(model, source, [], layout, "query")[0]
    log_p[[IDS.bos, IDS.pad, IDS.mask, IDS.unk]] = -torch.inf
    if top_k:
        log_p[log_p < log_p.topk(top_k).values[-1]] = -torch.inf
    expected = (log_p / temperature).softmax(dim=0)
    expected_by_token = {(0 if t == IDS.eos else t): float(p) for t, p in enumerate(expected) if p}
    found = drawn(model, source, 1000, temperature=temperature, top_k=top_k, seed=1)
    for seed in (2, 3, 4):
        found += drawn(model, source, 1000, temperature=temperature, top_k=top_k, seed=seed)
    assert set(found) <= set(expected_by_token)
    chi2 = sum((found[t] - n * p) ** 2 / (n * p) for t, p in expected_by_token.items())
    assert chi2 < 2.5 * len(expected_by_token) + 15
    if not top_k:
        assert len(found) >= 6


@pytest.mark.parametrize(("start", "stream"), LAYOUTS)
def test_scores_of_samples_are_the_models(start: Layout, stream: str) -> None:
    model, layout, sources = talkative(init_std=0.2), ArLayout.aligned(start, IDS), some_sources()
    options = ArDecoding(sample=True, n_best=2, temperature=0.7, top_k=5, max_length=9, length_penalty=0.5)
    found = sample(model, pack(sources), layout, stream, options)
    assert len({len(text) for text in found.tokens}) > 2
    for index, (text, score) in enumerate(zip(found.tokens, found.scores, strict=True)):
        log_p = log_probabilities(model, sources[index // 2], text.tolist(), layout, stream)
        total = sum(float(log_p[i, token]) for i, token in enumerate([*text.tolist(), IDS.eos]))
        assert score == pytest.approx(total / (len(text) + 1) ** 0.5, abs=1e-9)


def test_the_likeliest_alone_is_greedy() -> None:
    model, layout = talkative(), ArLayout.aligned("eos_first", IDS)
    greedy = beam_search(model, pack(some_sources()), layout, "query", ArDecoding(beam=1, max_length=12))
    for options in ({"top_k": 1}, {"temperature": 1e-9}):
        found = sample(model, pack(some_sources()), layout, "query", ArDecoding(sample=True, max_length=12, **options))
        assert [t.tolist() for t in found.tokens] == [t.tolist() for t in greedy.tokens]
        assert found.scores == pytest.approx(greedy.scores, abs=1e-9)


def test_neither_the_batch_nor_other_texts_change_a_sample() -> None:
    model, layout, sources = talkative(init_std=0.2), ArLayout.aligned("bos_first", IDS), some_sources()

    def write(order: list[int], n: int, seed: int = 7) -> dict[int, list[list[int]]]:
        rows = pack([sources[i] for i in order], order)
        options = ArDecoding(sample=True, n_best=n, seed=seed, max_length=16)
        tokens = [text.tolist() for text in sample(model, rows, layout, "query", options).tokens]
        return {number: tokens[at * n : at * n + n] for at, number in enumerate(order)}

    together = write([0, 1, 2, 3, 4], 3)
    for order in ([4, 2], [3], [1, 0]):
        assert write(order, 3) == {number: together[number] for number in order}
        assert write(order, 1) == {number: together[number][:1] for number in order}
    assert write([0, 1, 2, 3, 4], 3, seed=8) != together
    assert len({str(text) for texts in together.values() for text in texts}) > 10


def test_equal_sources_are_drawn_apart() -> None:
    model, layout, source = talkative(init_std=0.2), ArLayout.aligned("bos_first", IDS), some_sources()[1]
    found = sample(model, pack([source] * 6), layout, "query", ArDecoding(sample=True, max_length=16))
    assert len({str(text.tolist()) for text in found.tokens}) > 3


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_best": 5}, "`n_best` must be at most `beam`, 4, unless with `sample`, got 5"),
        ({"temperature": 0.7}, "`temperature` must not be given without `sample`"),
        ({"top_k": 7}, "`top_k` must not be given without `sample`"),
        ({"seed": 7}, "`seed` must not be given without `sample`"),
        ({"sample": True, "beam": 2}, "`beam` must not be given with `sample`"),
        ({"sample": True, "temperature": 0.0}, "`temperature` must be greater than 0"),
        ({"sample": True, "temperature": float("nan")}, "`temperature` must be a finite number"),
        ({"no_repeat_ngram": -1}, "`no_repeat_ngram` must be greater than or equal to 0"),
    ],
)
def test_options_that_do_not_fit_together(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        validate(ArDecoding, options, where="decoding")


def test_a_section_written_out_in_full_is_read_back() -> None:
    for options in ({}, {"sample": True, "temperature": 0.5}, {"beam": 2, "n_best": 2}):
        full = ArDecoding(**options).model_dump()
        assert validate(ArDecoding, full, where="decoding") == ArDecoding(**options)


def test_edges_of_sampling() -> None:
    model, layout = tiny_model(), ArLayout.aligned("bos_first", IDS)
    assert sample(model, pack([]), layout, "query", ArDecoding(sample=True)).tokens == []
    shortest = sample(model, pack(some_sources()), layout, "query", ArDecoding(sample=True, max_length=3))
    assert all(len(tokens) <= 1 for tokens in shortest.tokens)
    with pytest.raises(ConfigError, match="64 positions, got 65"):
        sample(model, pack(some_sources()), layout, "query", ArDecoding(sample=True, max_length=65))

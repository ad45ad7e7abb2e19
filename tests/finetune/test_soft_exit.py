"""Soft exit: the packed decoder equals a plain loop over one text at a time, whatever its neighbours."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from finetune.decoding.soft_exit import SoftExitDecoding, soft_exit
from pretrain.errors import ConfigError
from pretrain.models import EncoderDecoder, reference
from pretrain.models.layers import DecoderLayer
from pretrain.models.patterns import FirstRow
from tests.finetune.models import IDS, pack, some_sources, tiny_model

VOCAB, LAYERS = 40, 3
BANNED = [IDS.bos, IDS.pad, IDS.mask, IDS.unk]
SIXTEEN = SoftExitDecoding(max_length=16)


def soft_model(seed: int = 0, **changes: object) -> EncoderDecoder:
    """Rows hear little of each other and much of their places, else random weights write one word again and again."""
    model = tiny_model(VOCAB, seed, decoder_layers=LAYERS, soft_exit=True, logits_bias=True, **changes)
    for ramp in model.ramps:  # random, else they would be equal
        torch.nn.init.normal_(ramp.get_parameter("weight"), std=0.5)
    for name, weight in model.decoder.named_parameters():
        weight.data *= 5.0 if "embed_positions" in name else 0.1 if "attn.out_proj" in name else 1.0
    return model


def bias(model: EncoderDecoder) -> torch.Tensor:
    assert model.head.bias_V is not None
    return model.head.bias_V.data


@torch.no_grad()
def plain(model: EncoderDecoder, source: np.ndarray, n: int, first: FirstRow) -> tuple[list[int], float]:
    """One text by the definition, padded arrays and score matrices written out."""
    tokens = torch.from_numpy(source)[None]
    real = torch.ones_like(tokens).bool()
    memory = reference.encode(model, tokens, torch.arange(len(source))[None], real)
    masks = torch.full((1, n), IDS.mask)
    masks[0, 0] = IDS.bos if first == "bos" else IDS.mask
    x = reference.embed(model, model.decoder, masks, torch.arange(n)[None])
    for number, layer in enumerate(model.decoder.layers, start=1):
        assert isinstance(layer, DecoderLayer)
        keys = layer.self_attn_layer_norm(x) if layer.pre_norm else x
        x = reference.decoder_layer(layer, x, keys, torch.ones(1, n, n).bool(), memory, real)
        logits = model.ramp(number)(model.decoder.layer_norm(x))[0]
        if number < LAYERS:
            fed = model.shared(logits.argmax(dim=1)) * model.scale
            x = F.linear(torch.cat([x, fed[None]], dim=2), model.feedback.weight)
    log_p = logits.log_softmax(dim=1)
    log_p[:, BANNED] = -torch.inf
    best = log_p.max(dim=1)
    written = best.indices.tolist()
    end = written.index(IDS.eos) if IDS.eos in written else n
    return written[:end], float(best.values[: end + 1].mean())


@given(
    seed=st.integers(0, 10_000),
    longest=st.integers(3, 20),
    first=st.sampled_from(["mask", "bos"]),
    norm=st.sampled_from(["post", "pre"]),
    ramps=st.sampled_from(["shared", "separate"]),
)
def test_it_follows_the_definition(seed: int, longest: int, first: FirstRow, norm: str, ramps: str) -> None:
    model, sources = soft_model(seed, norm=norm, off_ramps=ramps, embed_scale=norm == "pre"), some_sources(seed=seed)
    made = soft_exit(model, pack(sources), first, SoftExitDecoding(max_length=longest))
    wanted = [plain(model, source, longest - 1, first) for source in sources]
    assert [tokens.tolist() for tokens in made.tokens] == [tokens for tokens, _ in wanted]
    np.testing.assert_allclose(made.scores, [score for _, score in wanted], atol=1e-10)
    assert made.passes == 1 and made.exits is None


def test_texts_are_of_many_words_and_their_own() -> None:
    """Else these tests would prove little."""
    made = soft_exit(soft_model(seed=2), pack(some_sources()), "mask", SIXTEEN)
    assert len({tuple(tokens.tolist()) for tokens in made.tokens}) == 5
    assert min(len(set(tokens.tolist())) for tokens in made.tokens) > 2


def test_other_sentences_and_their_order_do_not_matter() -> None:
    model, sources = soft_model(seed=2), some_sources()
    together = soft_exit(model, pack(sources), "mask", SIXTEEN)
    backwards = soft_exit(model, pack(sources[::-1]), "mask", SIXTEEN)
    for i, source in enumerate(sources):
        alone = soft_exit(model, pack([source]), "mask", SIXTEEN)
        assert alone.tokens[0].tolist() == together.tokens[i].tolist() == backwards.tokens[-1 - i].tolist()
        assert alone.scores[0] == pytest.approx(together.scores[i], abs=1e-10)
        assert backwards.scores[-1 - i] == pytest.approx(together.scores[i], abs=1e-10)


def test_eos_ends_a_text_and_no_other_special_id_is_written() -> None:
    model = soft_model()
    bias(model)[BANNED] = 50.0
    bias(model)[IDS.eos] = -50.0
    endless = soft_exit(model, pack(some_sources()), "mask", SIXTEEN)
    assert [len(tokens) for tokens in endless.tokens] == [15] * 5
    assert not any({*BANNED, IDS.eos} & set(tokens.tolist()) for tokens in endless.tokens)
    bias(model)[IDS.eos] = 500.0
    ended = soft_exit(model, pack(some_sources()), "mask", SIXTEEN)
    assert [len(tokens) for tokens in ended.tokens] == [0] * 5 and ended.scores == pytest.approx([0.0] * 5)


def test_a_text_is_cut_at_its_first_eos() -> None:
    model, source = soft_model(), some_sources()[1]
    bias(model)[IDS.eos] = -50.0
    whole = soft_exit(model, pack([source]), "mask", SIXTEEN).tokens[0].tolist()
    # The same rows with EOS for a word that is written twice, not at the start.
    word = next(word for word in whole if whole.index(word) and whole.count(word) > 1)
    model.ids = type(IDS)(bos=IDS.bos, pad=IDS.pad, eos=word, mask=IDS.mask, unk=IDS.unk)
    cut = soft_exit(model, pack([source]), "mask", SIXTEEN).tokens[0].tolist()
    assert cut and cut == whole[: whole.index(word)]


def test_lengths() -> None:
    model = soft_model()
    bias(model)[IDS.eos] = -50.0
    assert len(soft_exit(model, pack(some_sources()[:1]), "mask", SoftExitDecoding()).tokens[0]) == 63
    with pytest.raises(ConfigError, match="`max_length` must be at most the model's 64 positions, got 65"):
        soft_exit(model, pack(some_sources()), "mask", SoftExitDecoding(max_length=65))
    assert soft_exit(model, pack([]), "mask", SIXTEEN).tokens == []


def test_a_model_in_training_mode_writes_the_same_and_stays_in_it() -> None:
    model = soft_model(dropout=0.5)
    wanted = [tokens.tolist() for tokens in soft_exit(model, pack(some_sources()), "mask", SIXTEEN).tokens]
    model.train()
    made = soft_exit(model, pack(some_sources()), "mask", SIXTEEN)
    assert [tokens.tolist() for tokens in made.tokens] == wanted and model.training


def test_it_takes_no_reference() -> None:
    assert list(inspect.signature(soft_exit).parameters) == ["model", "source", "first_row", "options"]

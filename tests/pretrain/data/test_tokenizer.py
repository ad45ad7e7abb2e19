"""The tokenizer: lossless, deterministic, deaf to special tokens in text, and plain about bad files."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.tokenizer import SPECIAL_TOKENS, TextTokenizer, train_bpe
from pretrain.errors import ConfigError, DataError

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Where is the fox? The fox is here, and the dog too!"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_bpe(TEXTS, 400)


def test_special_ids_come_first_and_training_is_deterministic(tokenizer: TextTokenizer) -> None:
    assert (tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.unk, tokenizer.mask) == (0, 1, 2, 3, 4)
    again = train_bpe(iter(TEXTS), 400)
    assert again.json_text == tokenizer.json_text and again.sha256 == tokenizer.sha256
    assert train_bpe(TEXTS, 300).sha256 != tokenizer.sha256


@pytest.mark.parametrize(
    "text",
    ["<mask> a</s><s><pad><unk>", "é😀漢字 שלום", "a\x00b", "  two  spaces\n\ttab ", "", "�", "e\u0301"],
)
def test_text_never_becomes_a_special_id_and_comes_back(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert not np.isin(ids, range(5)).any()
    assert tokenizer.decode(ids) == text
    assert np.array_equal(tokenizer.encode_batch(["x", text])[1], ids)


def test_special_ids_are_dropped_from_text(tokenizer: TextTokenizer) -> None:
    ids = [0, *tokenizer.encode("the fox"), 4, 2, 1]
    assert tokenizer.decode(ids) == "the fox"


def test_word_starts(tokenizer: TextTokenizer) -> None:
    assert tokenizer.word_starts.shape == (tokenizer.vocab_size,) and tokenizer.word_starts.dtype == bool
    ids = tokenizer.encode(" the <mask> foxes")
    starts = [tokenizer.decode([number]).startswith(" ") for number in ids]
    assert tokenizer.word_starts[ids].tolist() == starts and sum(starts) == 3


def test_hash_survives_save_reformatting_and_pickle(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert TextTokenizer.from_path(tmp_path).sha256 == tokenizer.sha256
    compact = tmp_path / "compact.json"
    compact.write_text(json.dumps(json.loads(tokenizer.json_text)))
    assert TextTokenizer.from_path(compact).sha256 == tokenizer.sha256
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert np.array_equal(copy.encode("a <mask>"), tokenizer.encode("a <mask>"))


def test_truncation_saved_in_the_file_is_ignored(tokenizer: TextTokenizer) -> None:
    values = json.loads(tokenizer.json_text)
    values["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    text = "The quick brown fox jumps over the lazy dog."
    assert np.array_equal(TextTokenizer.from_json(json.dumps(values)).encode(text), tokenizer.encode(text))


def test_bad_input_is_named(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        TextTokenizer.from_path(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"must be a tokenizer\.json"):
        TextTokenizer.from_path(tmp_path)
    lacking = tokenizer.json_text.replace(SPECIAL_TOKENS[4], "<musk>")
    with pytest.raises(DataError, match="lacks <mask>"):
        TextTokenizer.from_json(lacking)
    with pytest.raises(ConfigError, match="from 261 to"):
        train_bpe(TEXTS, 100)
    with pytest.raises(DataError, match="got none"):
        train_bpe([], 300)

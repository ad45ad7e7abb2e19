"""Text from hell: the ids in the shards are those of a plain reference, or the document is counted as left out."""

import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pretrain.data.dataset import ShardDataset
from pretrain.data.prepare import TOO_SHORT, prepare
from pretrain.data.tokenizer import TextTokenizer, train_bpe

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
HELL = {
    "nothing": "",
    "white space": " \t\n\u2003\u00a0\n",
    "one token": "a",
    "a line of a megabyte": "word " * 200_000,
    "an enormous word": "x" * 200_000,
    "nul": "before\0after and \0 alone",
    "lone surrogates": "high \ud800 low \udfff swapped \udfff\ud800 end of it",
    "a surrogate pair": json.loads('"face \\ud83d\\ude00 in two halves"'),
    "no character": "\ufffe \uffff \U0010ffff at the edges of Unicode",
    "right to left": "שלום עולם. \u202eסוף\u202c مرحبا بالعالم؟ نعم!",  # noqa: RUF001
    "combining": "e\u0301" * 40 + " " + "a" + "\u0300" * 200,
    "not composed": "Å is A\u030a, and ﬁ stays what it is",
    "byte order mark": "\ufeffbegins with a mark \ufeff and has one inside",
    "special tokens": "<s>You</s><mask> <pad><unk> </s></s> <mask>, and again <s><s>",
    "line breaks": "one\rtwo\r\nthree\x0bfour\x0cfive\x85six\u2028seven\u2029eight of them",
    "control": "bell \x07 escape \x1b[31m delete \x7f c1 \x9b here",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 1️⃣ zero\u200bwidth\u200djoiner",
    "full stops": "." * 5000 + " " + "!?" * 500 + " A. B. C. D.",
    "braces": '{"text": "not a record"} \\u0000 \\ud800 %s {0} ${HOME}',
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter(["Some plain words to begin with, and a few more of them."] * 20), 300).save(folder)
    return folder


def reference(document: str, text_tokenizer: TextTokenizer) -> list[int]:
    """Ids of a document, the simple way: clean all of it, squeeze white space, encode in one go.

    Exact for byte-level BPE, whose words never reach across a space, wherever sentences are cut.
    """
    text = "".join("\ufffd" if "\ud800" <= sign <= "\udfff" else sign for sign in document)
    text = re.sub("[\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", " ", text)
    text = "".join(sign for sign in text if sign in "\t\x1f" or unicodedata.category(sign) != "Cc")
    text = " ".join(unicodedata.normalize("NFC", text.replace("\ufeff", "")).split())
    plain = json.loads(text_tokenizer.json_text)
    plain["added_tokens"] = []  # here `<mask>` is six letters
    return Tokenizer.from_str(json.dumps(plain)).encode(text, add_special_tokens=False).ids


def check(folder: Path, tokenizer: Path, documents: list[str], max_length: int = 64) -> None:
    folder.mkdir(exist_ok=True)
    padding = "This one is there so that the folder is never empty."
    lines = [json.dumps({"text": text}) + "\n" for text in [padding, *documents]]
    (folder / "a.jsonl").write_text("".join(lines), encoding="ascii")
    manifest = prepare(
        folder / "out", [f"x=jsonl:{folder}/a.jsonl"], tokenizer=str(tokenizer), max_length=max_length, valid_permille=0
    )
    dataset = ShardDataset(folder / "out")
    wanted = [reference(text, dataset.tokenizer) for text in [padding, *documents]]
    # A sample shorter than four tokens is dropped: whole documents are counted, the end of a long one is not.
    short = sum(len(ids) < 4 for ids in wanted)
    assert manifest.sources[0].skipped.get(TOO_SHORT, 0) == short
    assert manifest.sources[0].documents == len(wanted)
    kept = [ids for ids in wanted if len(ids) >= 4]
    found = [dataset.tokens(sample).tolist() for sample in reversed(range(len(dataset)))]
    for ids in kept:
        at = 0
        while found and found[-1] == ids[at : at + len(found[-1])] and at < len(ids):
            at += len(found.pop())
        assert len(ids) - at < 4, "tokens are lost or changed"
    assert not found
    specials = {dataset.tokenizer.bos, dataset.tokenizer.eos, dataset.tokenizer.mask, dataset.tokenizer.pad}
    assert not specials & {token for ids in wanted for token in ids}


@pytest.mark.parametrize("name", HELL)
def test_each(name: str, tokenizer: Path, tmp_path: Path) -> None:
    check(tmp_path, tokenizer, [HELL[name]])


def test_all_at_once_in_any_order(tokenizer: Path, tmp_path: Path) -> None:
    documents = [text for text in HELL.values() if len(text) < 100_000]
    random.Random(0).shuffle(documents)
    check(tmp_path, tokenizer, documents * 2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=80), max_size=6))
def test_anything(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> None:
    check(tmp_path_factory.mktemp("any"), tokenizer, documents)


def one_token_documents(folder: Path, tokenizer: Path, count: int) -> None:
    (folder / "a.txt").write_text("A document of many words stands first.\n\n" + "a\n\n" * count)
    manifest = prepare(folder / "out", [f"x=text:{folder}/a.txt"], tokenizer=str(tokenizer), workers=2)
    (source,) = manifest.sources
    assert source.documents == count + 1 and source.skipped == {TOO_SHORT: count} and source.samples == 1


def test_many_documents_of_one_token(tokenizer: Path, tmp_path: Path) -> None:
    one_token_documents(tmp_path, tokenizer, 20_000)


@pytest.mark.slow
def test_a_million_documents_of_one_token(tokenizer: Path, tmp_path: Path) -> None:
    one_token_documents(tmp_path, tokenizer, 1_000_000)


def test_bytes_that_are_no_utf8_are_kept_as_one_sign_each(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 in Latin-1, \xff\xfe and a cut \xe2\x82 sign")
    prepare(tmp_path / "out", [f"x=text:{tmp_path}/a.txt"], tokenizer=str(tokenizer), valid_permille=0)
    dataset = ShardDataset(tmp_path / "out")
    text = "caf\ufffd in Latin-1, \ufffd\ufffd and a cut \ufffd sign"
    assert np.concatenate([dataset.tokens(n) for n in range(len(dataset))]).tolist() == reference(
        text, dataset.tokenizer
    )

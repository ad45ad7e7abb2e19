"""BART's tokenizer from published files: ids as transformers gives them, on text of every kind; bad files are named."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from pretrain.data.bart_tokenizer import hugging_face_files
from pretrain.data.prepare import prepare
from pretrain.data.tokenizer import TextTokenizer, train_bpe
from pretrain.errors import DataError

transformers = pytest.importorskip("transformers")

ODD = [
    "Hello world", " Hello world", "  two  spaces\n\ttabs\r\n ", "", " ", "don't WE'll I'M 's", "3.14 1,000 ½ ²",
    "naïve café e\u0301 ﬁ", "שלום עולם مرحبا", "漢字かな 한국어", "👋🏽 🏳️‍🌈 😀😀", "a\x00b\x7f\x1b[31m",
    "\u2028\u2029\x85\xa0\u3000\ufeff", "�\U0010ffff", "<|endoftext|> madeupword0000", "x" * 5000, "\n" * 50,
]  # fmt: skip
SPECIAL = ["a <mask> b", "<s>x</s>", "<pad><unk>", "<mask>", "tail <mask>"]


@pytest.fixture(scope="module")
def gpt2(test_data: Path) -> Path:
    return test_data / "gpt2_bpe"


@pytest.fixture(scope="module")
def published(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt by the definition in gpt2_bpe's README, written without our code."""
    folder = tmp_path_factory.mktemp("bart")
    token_of = {str(number): token for token, number in json.loads((gpt2 / "encoder.json").read_text()).items()}
    names = [line.split()[0] for line in (gpt2 / "dict.txt").read_text().splitlines()]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(token_of.get(name, name) for name in names), "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_bytes((gpt2 / "vocab.bpe").read_bytes())
    return folder


@pytest.fixture(scope="module")
def ours(gpt2: Path) -> TextTokenizer:
    return TextTokenizer.from_path(gpt2)


@pytest.fixture(scope="module")
def theirs(published: Path) -> object:
    vocabulary, merges = str(published / "vocab.json"), str(published / "merges.txt")
    return transformers.BartTokenizer(vocab=vocabulary, merges=merges)


def test_special_ids_and_size_are_barts(ours: TextTokenizer) -> None:
    assert (ours.bos, ours.pad, ours.eos, ours.unk, ours.mask) == (0, 1, 2, 3, 50264)
    assert ours.vocab_size == 50265


def test_known_vectors(ours: TextTokenizer, gpt2: Path) -> None:
    names = [line.split()[0] for line in (gpt2 / "dict.txt").read_text().splitlines()]
    for text, numbers in {
        "This is some text": [1212, 318, 617, 2420],
        "indivisible": [521, 452, 12843],
        "hello 👋 world 🌍": [31373, 50169, 233, 995, 12520, 234, 235],
        "": [],
    }.items():
        assert [int(names[number - 4]) for number in ours.encode(text)] == numbers
    # stated in fairseq's and transformers' documentation
    assert ours.encode("Hello world").tolist() == [31414, 232]
    assert ours.encode(" Hello world").tolist() == [20920, 232]


def test_ids_are_those_of_transformers(ours: TextTokenizer, theirs: object, published: Path) -> None:
    draw = random.Random(4)
    ranges = [(32, 127), (160, 0xD800), (0x10000, 0x1FBFF)]
    made = ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(80))) for _ in range(200)]
    hugging_face = TextTokenizer.from_path(published)
    assert hugging_face.sha256 == ours.sha256, "both sets of files are one tokenizer"
    for text in ODD + made:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text).tolist() == ids, text
        assert ours.decode(ids) == text
        assert theirs(text)["input_ids"] == [0, *ids, 2]


def test_special_tokens_in_text_are_text(ours: TextTokenizer, theirs: object) -> None:
    for text in SPECIAL:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text).tolist() == ids
        assert not {0, 1, 2, 3, 50264} & set(ids)
        assert ours.decode(ids) == text


@given(text=st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_has_the_ids_of_transformers(ours: TextTokenizer, theirs: object, text: str) -> None:
    assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("which", ["bart", "trained"])
def test_exported_files_give_transformers_the_same_ids(which: str, gpt2: Path, tmp_path: Path) -> None:
    small = train_bpe(["the quick brown fox and the lazy dog were here"] * 3, 290)
    tokenizer = TextTokenizer.from_path(gpt2) if which == "bart" else small
    for name, content in hugging_face_files(tokenizer.json_text, 77).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    loaded = transformers.BartTokenizerFast.from_pretrained(tmp_path)
    vocabulary, merges = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    built = transformers.BartTokenizerFast(vocab=vocabulary, merges=merges)
    automatic = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ODD:
        ids = [tokenizer.bos, *tokenizer.encode(text).tolist(), tokenizer.eos]
        for other in (loaded, built, automatic):
            assert other(text)["input_ids"] == ids, text
    assert loaded.model_max_length == 77
    assert (loaded.bos_token_id, loaded.mask_token_id) == (tokenizer.bos, tokenizer.mask)
    assert loaded("a<mask>")["input_ids"][-2] == tokenizer.mask
    # The files of an export are a tokenizer for `prepare` again, the same one.
    assert TextTokenizer.from_path(tmp_path).sha256 == tokenizer.sha256


def test_prepare_accepts_the_folder(gpt2: Path, ours: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello world. Hello again, old world!\n")
    manifest = prepare(tmp_path / "out", [f"a=text:{tmp_path}/a.txt"], tokenizer=str(gpt2), max_length=64)
    assert (manifest.tokenizer_sha256, manifest.vocab_size) == (ours.sha256, 50265)


def small_files(folder: Path) -> None:
    """A complete GPT-2 style set with 256 bytes and one merge."""
    tokens = sorted(ByteLevel.alphabet())
    encoder = {token: number for number, token in enumerate([*tokens, "ab"])}
    (folder / "encoder.json").write_text(json.dumps(encoder))
    (folder / "vocab.bpe").write_text("#version: 0.2\na b\n")
    (folder / "dict.txt").write_text("".join(f"{number} 1\n" for number in reversed(range(len(encoder)))))


def append(name: str, text: str):
    def change(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(text)

    return change


def without_a_byte(folder: Path) -> None:
    values = json.loads((folder / "encoder.json").read_text())
    number = values.pop("z")
    (folder / "encoder.json").write_text(json.dumps(values))
    lines = (folder / "dict.txt").read_text().splitlines(keepends=True)
    (folder / "dict.txt").write_text("".join(line for line in lines if line != f"{number} 1\n"))


BROKEN = {
    "a line without a count": (append("dict.txt", "madeupword0000\n"), "line 258 must be a token and its count"),
    "a repeated line": (append("dict.txt", "0 1\n"), "line 258 repeats the token 0"),
    "a dictionary that is cut": (lambda f: (f / "dict.txt").write_text("1 1\n"), "it lacks 0"),
    "a merge of three": (append("vocab.bpe", "a b c\n"), "line 3 must be two tokens"),
    "a merge into nothing": (append("vocab.bpe", "b c\n"), "must make a byte-level BPE"),
    "no JSON": (lambda f: (f / "encoder.json").write_text("{"), "cannot be read"),
    "ids that are no numbers": (lambda f: (f / "encoder.json").write_text('{"a": "b"}'), "an object of tokens"),
    "ids twice": (lambda f: (f / "encoder.json").write_text('{"a": 1, "b": 1}'), "an id of its own"),
    "a list": (lambda f: (f / "encoder.json").write_text("[1]"), "an object of tokens"),
    "nesting": (lambda f: (f / "encoder.json").write_text("[" * 100_000), "cannot be read"),
    "no UTF-8": (lambda f: (f / "vocab.bpe").write_bytes(b"\xff\xfe"), "cannot be read"),
    "a byte that is missing": (without_a_byte, "it lacks z"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_refused_in_one_line(what: str, tmp_path: Path) -> None:
    small_files(tmp_path)
    assert TextTokenizer.from_path(tmp_path).encode("abz").tolist()[0] == 4  # `ab` is the first line of dict.txt
    damage, message = BROKEN[what]
    damage(tmp_path)
    with pytest.raises(DataError) as refused:
        TextTokenizer.from_path(tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_an_incomplete_set_names_what_is_wanted(tmp_path: Path) -> None:
    small_files(tmp_path)
    (tmp_path / "vocab.bpe").unlink()
    with pytest.raises(DataError, match=r"vocab\.json and merges\.txt, or with encoder\.json, vocab\.bpe, dict\.txt"):
        TextTokenizer.from_path(tmp_path)

"""BART's tokenizer, from the files in which it is published, and the files in which Hugging Face reads it.

    vocab.json merges.txt               Hugging Face: {token: id} with the special tokens, merges
    encoder.json vocab.bpe dict.txt     GPT-2's tokens and merges, and fairseq's dictionary, which gives the ids:
                                        <s> <pad> </s> <unk> are 0 to 3, line n of dict.txt is n + 4, <mask> is last

Both are GPT-2's byte-level BPE. A space belongs to the word behind it, and none is put before the first word: a text
that begins with a word has another first token (`Hello`) than the same word inside a text (`ĠHello`). BART was
trained on whole documents encoded that way, and `prepare` does the same: the first sentence of a document has no space
before it, the others do.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from pretrain.data.special import BOS, EOS, MASK, PAD, SPECIAL_TOKENS, UNK
from pretrain.errors import DataError
from pretrain.plain import read_plain

HUGGING_FACE = ("vocab.json", "merges.txt")
GPT2 = ("encoder.json", "vocab.bpe", "dict.txt")


def tokenizer_json(folder: str | Path) -> str | None:
    """The text of a tokenizer.json made of the files in `folder`; None where neither set of files is complete.

    Raises:
        DataError: a file cannot be read or does not hold what it must.
    """
    place = Path(folder)
    if all((place / name).is_file() for name in HUGGING_FACE):
        vocabulary, merges = place / HUGGING_FACE[0], place / HUGGING_FACE[1]
        return _build(_read_ids(vocabulary), _read_merges(merges), where=vocabulary)
    if all((place / name).is_file() for name in GPT2):
        encoder, merges, dictionary = (place / name for name in GPT2)
        return _build(_fairseq_ids(encoder, dictionary), _read_merges(merges), where=dictionary)
    return None


def hugging_face_files(json_text: str, max_length: int) -> dict[str, str]:
    """{file name: content} with which `BartTokenizerFast.from_pretrained` gives the ids of a tokenizer.json.

    max_length: tokens of a text at most, for truncation. A tokenizer that is no byte-level BPE is declared as what it
    is, for `AutoTokenizer`.
    """
    values = json.loads(json_text)
    byte_level = values["model"]["type"] == "BPE" and (values.get("pre_tokenizer") or {}).get("type") == "ByteLevel"
    config: dict[str, Any] = {
        "tokenizer_class": "BartTokenizer" if byte_level else "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "bos_token": BOS,
        "cls_token": BOS,
        "eos_token": EOS,
        "sep_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "mask_token": MASK,
    }
    files = {"tokenizer.json": json_text}
    if byte_level:
        config["add_prefix_space"] = bool(values["pre_tokenizer"].get("add_prefix_space"))
        added = {token["content"]: token["id"] for token in values["added_tokens"]}
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in values["model"]["merges"]]
        files["vocab.json"] = json.dumps({**values["model"]["vocab"], **added}, ensure_ascii=False)
        files["merges.txt"] = "".join(f"{line}\n" for line in ("#version: 0.2", *pairs))
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return files


def _build(ids: Mapping[str, int], merges: list[tuple[str, str]], where: Path) -> str:
    lacking = [token for token in (*SPECIAL_TOKENS, *pre_tokenizers.ByteLevel.alphabet()) if token not in ids]
    if lacking:
        raise DataError(f"`{where}` must have the special tokens and all 256 bytes, it lacks {' '.join(lacking[:8])}")
    try:
        made = Tokenizer(models.BPE(dict(ids), merges, continuing_subword_prefix="", end_of_word_suffix=""))
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"`{where}` and its merges must make a byte-level BPE: {reason}") from None
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.RobertaProcessing((EOS, ids[EOS]), (BOS, ids[BOS]), add_prefix_space=False)
    # As BART declares it, <mask> swallows the space before it wherever special tokens are read from text.
    made.add_special_tokens([AddedToken(token, lstrip=token == MASK, normalized=False) for token in SPECIAL_TOKENS])
    return str(made.to_str())


def _fairseq_ids(encoder: Path, dictionary: Path) -> dict[str, int]:
    """{token: id}: the lines of dict.txt are `number count`, the number being GPT-2's, in the order of the ids."""
    token_of = {str(number): token for token, number in _read_ids(encoder).items()}
    ids = {BOS: 0, PAD: 1, EOS: 2, UNK: 3}
    for line_number, line in enumerate(_lines(dictionary), start=1):
        name, _, count = line.rpartition(" ")
        if not name or not count.isdecimal():
            raise DataError(f"`{dictionary}`: line {line_number} must be a token and its count, is {line[:40]!r}")
        token = token_of.get(name, name)
        if token in ids:
            raise DataError(f"`{dictionary}`: line {line_number} repeats the token {name}")
        ids[token] = len(ids)
    absent = next((number for number, token in token_of.items() if token not in ids), None)
    if absent is not None:
        raise DataError(f"`{dictionary}` must name every token of {encoder.name}, it lacks {absent}")
    return {**ids, MASK: len(ids)}


def _read_ids(path: Path) -> dict[str, int]:
    """{token: id} of a JSON object."""
    try:
        values = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"`{path}` cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict) or not all(type(number) is int and number >= 0 for number in values.values()):
        raise DataError(f"`{path}` must be an object of tokens and their ids")
    if len(set(values.values())) != len(values):
        raise DataError(f"`{path}` must give every token an id of its own")
    return values


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for line_number, line in enumerate(_lines(path), start=1):
        if line_number == 1 and line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise DataError(f"`{path}`: line {line_number} must be two tokens, is {line[:40]!r}")
        merges.append((left, right))
    return merges


def _lines(path: Path) -> list[str]:
    try:
        text = read_plain(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`{path}` cannot be read: {error}") from None
    # Not splitlines, which also splits at characters that are tokens.
    return [line for line in text.split("\n") if line]

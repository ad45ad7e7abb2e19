"""Text to token ids and back, by a Hugging Face `tokenizer.json`, BART's own files or a byte-level BPE trained here.

Text is only ever text: `<mask>` written inside a document is encoded as the characters `<`, `m`, ... and
never becomes the special id, so a corpus cannot forge the rows that the objectives build.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pretrain.data.bart_tokenizer import GPT2, HUGGING_FACE, tokenizer_json
from pretrain.data.files import write_atomic
from pretrain.data.special import BOS, EOS, SPECIAL_TOKENS
from pretrain.errors import ConfigError, DataError
from pretrain.plain import read_plain

if TYPE_CHECKING:
    from pretrain.models import SpecialIds

SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)
LARGEST_VOCAB = 2**24
TOKENIZER_FILE = "tokenizer.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# byte-level BPE writes the space before a word as the first letter, SentencePiece as the second.
WORD_MARKS = ("Ġ", "▁")
# Training takes quadratic time in the length of a word, so one of a megabyte would take minutes; encoding does not.
ENORMOUS_WORD = re.compile(r"\S{1000,}")


class TextTokenizer:
    """A tokenizer with the five special tokens that pre-training needs.

    bos, pad, eos, mask, unk: ids. vocab_size: largest id + 1. sha256: of `json_text`, the canonical file.
    word_starts: bool [vocab_size], True where a token begins a word; special tokens stand for themselves, so True.
    """

    def __init__(self, json_text: str, where: str = TOKENIZER_FILE) -> None:
        try:
            # Indentation is not content: the same tokenizer saved by two programs must have one hash.
            self.json_text = json.dumps(json.loads(json_text), ensure_ascii=False, indent=1) + "\n"
            self._tokenizer = Tokenizer.from_str(self.json_text)
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"`{where}` must be a tokenizer.json: {' '.join(str(error).split())[:200]}") from None
        self._tokenizer.encode_special_tokens = True
        # A tokenizer.json may carry the truncation of its last use, which would silently cut documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise DataError(f"`{where}` must know the tokens {' '.join(SPECIAL_TOKENS)}, it lacks {' '.join(missing)}")
        self.bos, self.pad, self.eos, self.unk, self.mask = (vocabulary[token] for token in SPECIAL_TOKENS)
        self.vocab_size = max(vocabulary.values()) + 1
        self.sha256 = hashlib.sha256(self.json_text.encode()).hexdigest()
        self.word_starts = np.zeros(self.vocab_size, bool)
        for token, number in vocabulary.items():
            self.word_starts[number] = token.startswith(WORD_MARKS) or token in SPECIAL_TOKENS

    @property
    def ids(self) -> "SpecialIds":
        """The special ids, as models and objectives take them."""
        from pretrain.models import SpecialIds  # brings torch, which the workers of `prepare` do without

        return SpecialIds(self.bos, self.pad, self.eos, self.mask, self.unk)

    @classmethod
    def from_path(cls, path: str | Path) -> "TextTokenizer":
        """Reads `path`, a tokenizer.json or a folder that holds one or the files of `bart_tokenizer`.

        Raises:
            DataError: naming what cannot be read.
        """
        file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
        if file != Path(path) and not file.exists() and (made := tokenizer_json(path)) is not None:
            return cls(made, where=str(path))
        try:
            return cls(read_plain(file).decode(), where=str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"tokenizer `{path}` must be a tokenizer.json or a folder with one, or with "
                f"{' and '.join(HUGGING_FACE)}, or with {', '.join(GPT2)}: {error}"
            ) from None

    @classmethod
    def from_path_or_hub(cls, path_or_id: str) -> "TextTokenizer":
        """`from_path`, or tokenizer.json of the Hugging Face repository `OWNER/NAME` if no such path exists."""
        if Path(path_or_id).exists() or not HUB_ID.fullmatch(path_or_id):
            return cls.from_path(path_or_id)
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(path_or_id, TOKENIZER_FILE)
        except Exception as error:  # network, missing repository, offline mode: each has a type of its own
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"tokenizer `{path_or_id}` is no local path and cannot be downloaded: {reason}") from None
        return cls.from_path(file)

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """Builds the tokenizer from the text of a tokenizer.json."""
        return cls(text)

    def __reduce__(self) -> tuple[object, ...]:
        return TextTokenizer, (self.json_text,)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 [N]; no special ids are added and none can come out of the text."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text, in order."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of `ids`; special ids are dropped, bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=True))

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` into `folder`; its bytes hash to `sha256`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(folder) / TOKENIZER_FILE, self.json_text.encode())


def check_vocab_size(vocab_size: int) -> None:
    """Raises `ConfigError` for a size that `train_bpe` cannot make."""
    if not SMALLEST_VOCAB <= vocab_size <= LARGEST_VOCAB:
        raise ConfigError(f"vocabulary size must be from {SMALLEST_VOCAB} to {LARGEST_VOCAB}, got {vocab_size}")


def train_bpe(texts: Iterable[str] | Iterator[str], vocab_size: int) -> TextTokenizer:
    """Trains byte-level BPE on `texts`; the same texts give the same bytes.

    Ids 0..4 are <s> <pad> </s> <unk> <mask>, then the 256 bytes, then merges. A small corpus may give fewer
    than `vocab_size` tokens. Words of 1,000 characters and more are left out.

    Raises:
        ConfigError: `vocab_size` out of range.
        DataError: `texts` is empty.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = False

    def watched() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen = True
            yield ENORMOUS_WORD.sub("", text)

    tokenizer.train_from_iterator(watched(), trainer)
    if not seen:
        raise DataError("a tokenizer must be trained on at least one document, got none")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", pair=f"{BOS} $A {EOS} {EOS} $B {EOS}", special_tokens=[(BOS, 0), (EOS, 2)]
    )
    return TextTokenizer(tokenizer.to_str())

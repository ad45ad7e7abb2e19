"""Raw text to clean sentences by fixed rules: the same bytes on every machine, linear time on any input."""

import functools
import re
import unicodedata
from collections.abc import Iterator

# Everything of category Cc except tab and the line breaks, which become white space; and the byte order mark.
CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]+")
SURROGATE = re.compile("[\ud800-\udfff]")
LINE_BREAK = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
PARAGRAPH_BREAK = re.compile(r"\n(?:[^\S\n]*\n)+")

# Where Unicode has characters that combine with the one before; the ranges in between are sparse.
FIRST_MARK, LAST_MARK = 0x300, 0x1FFFF
LONG_RUN = 32
_combining_class, _decomposed = unicodedata.combining, functools.partial(unicodedata.normalize, "NFD")

SENTENCE_ENDS = frozenset(".!?…")
CLOSERS = "\"'\u201d\u2019»)]}*_"
OPENERS = "\"'\u201c\u2018«([{*_`"
ABBREVIATIONS = frozenset(
    """e.g i.e etc vs cf al mr mrs ms dr prof st no vol fig sec ch pp approx resp inc ltd co jr sr gen col capt rev
    hon""".split()  # noqa: SIM905
)


def clean(document: str) -> str:
    """`document` in Unicode NFC with `\\n` line breaks and no control characters; lone surrogates become U+FFFD."""
    text = CONTROL.sub("", LINE_BREAK.sub("\n", SURROGATE.sub("\ufffd", document)))
    if not text.isascii():
        # `normalize` orders the marks on a letter by insertion, in quadratic time; those in order cost it nothing.
        text = _long_runs_of_marks().sub(lambda run: _in_canonical_order(run[0]), text)
    return unicodedata.normalize("NFC", text)


@functools.cache
def _long_runs_of_marks() -> re.Pattern[str]:
    marks = [chr(code) for code in range(FIRST_MARK, LAST_MARK + 1) if _combining_class(_decomposed(chr(code))[0])]
    return re.compile(f"[{''.join(marks)}]{{{LONG_RUN},}}")


def _in_canonical_order(marks: str) -> str:
    return "".join(sorted("".join(map(_decomposed, marks)), key=_combining_class))


def sentences(cleaned: str) -> Iterator[str]:
    """Sentences of a cleaned document: never empty, inner white space is one space, a blank line always ends one.

    A sentence ends after a word in `.`, `!`, `?` or an ellipsis (closing quotes and brackets may follow) when the
    next word does not begin with a lower-case letter; abbreviations and single initials do not end one.
    """
    for paragraph in PARAGRAPH_BREAK.split(cleaned):
        words = paragraph.split()
        start = 0
        for index in range(1, len(words)):
            if _ends_sentence(words[index - 1]) and _may_begin_sentence(words[index]):
                yield " ".join(words[start:index])
                start = index
        if words:
            yield " ".join(words[start:])


def _ends_sentence(word: str) -> bool:
    if word[-1] not in SENTENCE_ENDS and word[-1] not in CLOSERS:
        return False
    bare = word.rstrip(CLOSERS)
    if not bare or bare[-1] not in SENTENCE_ENDS:
        return False
    if bare[-1] != ".":
        return True
    stem = bare[:-1].lstrip(OPENERS)
    initial = len(stem) == 1 and stem.isupper() and stem != "I"
    return not initial and stem.lower() not in ABBREVIATIONS


def _may_begin_sentence(word: str) -> bool:
    bare = word.lstrip(OPENERS)
    return not bare or not bare[0].islower()

"""Cleaning and sentence splitting: fixed rules on ordinary and hostile text."""

import sys
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import text as module
from pretrain.data.text import clean, sentences


def split(text: str) -> list[str]:
    return list(sentences(clean(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One here. Two there! Three?", ["One here.", "Two there!", "Three?"]),
        ('He said "Go." She went.', ['He said "Go."', "She went."]),
        ("Use e.g. Python. See fig. 3 by J. Smith.", ["Use e.g. Python.", "See fig. 3 by J. Smith."]),
        ("version 3.14 is out... and so on", ["version 3.14 is out... and so on"]),
        ("Heading\n\n  text goes\n  on", ["Heading", "text goes on"]),
        ("a\r\n\r\nb\rc", ["a", "b c"]),
        ("a\x00b\x1b[0m \ufeffc", ["ab[0m c"]),
        ("x \ud800 y", ["x \ufffd y"]),
        ("e\u0301", ["\u00e9"]),
        (" \n\t\n", []),
        ("...", ["..."]),
    ],
)
def test_rules(text: str, expected: list[str]) -> None:
    assert split(text) == expected


@settings(deadline=None)
@given(st.text(alphabet=st.characters(), max_size=200))
def test_nothing_but_white_space_and_control_characters_is_lost(text: str) -> None:
    cleaned = clean(text)
    joined = " ".join(split(text))
    assert joined == " ".join(cleaned.split())
    assert all(unicodedata.category(c) not in ("Cc", "Cs") for c in joined)
    assert unicodedata.is_normalized("NFC", cleaned)


MARKS = "\u0315\u0300\u0327\u05b0\u0344\u0f73\u0f71\u0f72\u3099\U0001e94a"


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("aé\u1e69\u0f40か각 "), st.text(MARKS, max_size=80)), max_size=4))
def test_marks_are_ordered_as_unicode_says(letters: list[tuple[str, str]]) -> None:
    text = "".join(letter + marks for letter, marks in letters)
    assert clean(text) == unicodedata.normalize("NFC", text)


def test_every_mark_of_unicode_is_known() -> None:
    first = (unicodedata.normalize("NFD", chr(code))[0] for code in range(sys.maxunicode + 1))
    marks = [code for code, sign in enumerate(first) if unicodedata.combining(sign)]
    assert marks[0] >= module.FIRST_MARK and marks[-1] <= module.LAST_MARK


@pytest.mark.parametrize("unit", [".", '"', "a. ", "\n \n", ". \u2019", "A", "\0", "\ud800", "\u0315\u0300", "\u0f73"])
def test_time_is_linear_in_a_hostile_megabyte(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    split(text)
    assert time.perf_counter() - start < 5

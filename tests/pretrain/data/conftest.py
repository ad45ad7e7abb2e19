"""A small corpus of English-like text and a data folder prepared from it."""

import random
from pathlib import Path

import pytest

from pretrain.data.prepare import prepare

WORDS = "the a river tree stone bird sings falls near under old new bright slow and or Mary John water".split()  # noqa: SIM905


def write_corpus(file: Path, documents: int, seed: int) -> None:
    """`documents` blank-line separated documents of 1 to 6 sentences."""
    draw = random.Random(seed)
    blocks = []
    for number in range(documents):
        sentences = [
            " ".join(draw.choices(WORDS, k=draw.randint(3, 12))).capitalize() + "." for _ in range(draw.randint(1, 6))
        ]
        blocks.append(f"Number {number}. " + "\n".join(sentences))
    file.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "hills.txt", 400, seed=1)
    write_corpus(folder / "lakes.txt", 150, seed=2)
    return folder


@pytest.fixture(scope="session")
def arguments(corpus: Path) -> dict:
    sources = [f"hills=text:{corpus}/hills.txt", f"lakes=text:{corpus}/lakes.txt"]
    return {
        "sources": sources,
        "train_vocab": 400,
        "max_length": 32,
        "shard_bytes": 9000,
        "valid_permille": 100,
    }


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, arguments: dict) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(folder, **arguments)
    return folder

"""The hub as a source: one commit, no scripts, and one line within seconds where it cannot be reached."""

import socket
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest

from pretrain.data.prepare import prepare
from pretrain.data.sources import hub, parse_source
from pretrain.errors import DataError

COMMIT = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"


class Rows(list):
    column_names = ["title", "text"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of the hub, which has one dataset of three rows."""
    made: list[tuple[Any, ...]] = []

    def load(*arguments: Any, **options: Any) -> Rows:
        made.append(("load", *arguments, options))
        return Rows([{"title": "a", "text": "first"}, {"title": "b", "text": None}, {"title": "c", "text": "second"}])

    def info(_: Any, repository: str, revision: str | None = None, timeout: float | None = None) -> Any:
        made.append(("info", repository, revision, timeout is not None))
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    return made


def test_a_branch_is_settled_and_then_read_at_its_commit(calls: list[tuple[Any, ...]]) -> None:
    source = parse_source("wiki=hf:owner/set/20231101.en@refs/convert/parquet").pinned()
    assert source.spec == f"wiki=hf:owner/set/20231101.en@{COMMIT}#text" and source.pinned() == source
    skipped = Counter[str]()
    assert list(source.documents(skipped)) == ["first", "second"] and skipped == {"no text in `text`": 1}
    assert calls == [
        ("info", "owner/set", "refs/convert/parquet", True),
        ("info", "owner/set", COMMIT, True),
        ("load", "owner/set", "20231101.en", {"split": "train", "streaming": True, "revision": COMMIT}),
    ]
    assert list(parse_source(f"hf:owner/set@{COMMIT}#title").documents()) == ["a", "b", "c"]
    assert parse_source("hf:owner/set/20231101.en").name == "set-20231101-en"


def test_a_column_that_is_not_there(calls: list[tuple[Any, ...]]) -> None:
    with pytest.raises(DataError, match="must have a column `body`, it has title, text"):
        list(parse_source(f"hf:owner/set@{COMMIT}#body").documents())


@pytest.mark.parametrize("argument", ["", "../../etc/passwd", "a/b/c/d", "owner/set@", "owner/se t", "owner/set#"])
def test_what_is_no_id(argument: str) -> None:
    with pytest.raises(DataError, match=r"must look like (hf:)"):
        parse_source(f"x=hf:{argument}").pinned()


def test_a_dataset_that_is_a_script_is_refused(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **options: Any) -> Any:
        assert "trust_remote_code" not in options
        raise RuntimeError("Dataset scripts are no longer supported, but found set.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"scripts are no longer supported.*give NAME=parquet:GLOB"):
        list(parse_source(f"hf:owner/set@{COMMIT}").documents())


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_an_unreachable_hub_is_one_line_with_the_way_out(
    revision: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:  # bound and not listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for module in (huggingface_hub.constants, datasets.config):
            for name in ("ENDPOINT", "HF_ENDPOINT"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, endpoint)
        monkeypatch.setattr(hub, "SECONDS", 2.0)
        began = time.monotonic()
        with pytest.raises(DataError) as caught:
            prepare(tmp_path / "out", [f"hf:owner/set{revision}"], train_vocab=300)
    message = str(caught.value)
    assert "\n" not in message and "cannot be read from the Hugging Face hub" in message
    assert "NAME=parquet:GLOB, NAME=jsonl:GLOB or NAME=text:GLOB" in message
    assert time.monotonic() - began < 20 and not (tmp_path / "out" / "manifest.json").exists()


def test_offline_mode_is_one_line_too(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"cannot be read from the Hugging Face hub.*give NAME=parquet:GLOB") as caught:
        prepare(tmp_path / "out", ["hf:owner/set"], train_vocab=300)
    assert "\n" not in str(caught.value) and time.monotonic() - began < 10 and not (tmp_path / "out").exists()


def test_nothing_asks_for_a_script_to_be_run() -> None:
    root = Path(__file__).resolve().parents[4]
    files = [file for part in ("pretrain", "finetune", "kernels", "configs") for file in (root / part).rglob("*.[py]*")]
    assert len(files) > 100
    assert not [file for file in files if file.suffix in (".py", ".yaml") and "trust_remote" in file.read_text()]

"""`prepare`: byte-identical for any number of workers and any kill; readable by WebDataset; plain about bad input."""

import fcntl
import hashlib
import io
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data import prepare as preparing
from pretrain.data.dataset import ShardDataset
from pretrain.data.files import npy_bytes
from pretrain.data.manifest import read_manifest, verify_folder
from pretrain.data.prepare import prepare
from pretrain.data.shards import MIN_TOKENS, encode_sentences, pack
from pretrain.data.text import clean, sentences
from pretrain.data.tokenizer import TextTokenizer
from pretrain.errors import ConfigError, DataError
from tests.pretrain.data.conftest import write_corpus

ROOT = Path(__file__).resolve().parents[3]
RUN = "import json, sys; from pretrain.data.prepare import prepare; prepare(**json.loads(sys.argv[1]))"


def fingerprints(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_bytes_do_not_depend_on_the_number_of_workers(
    prepared: Path, arguments: dict, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "other"
    prepare(out, **arguments, workers=workers)
    assert fingerprints(out) == fingerprints(prepared)
    assert sum(name.endswith(".tar") for name in fingerprints(out)) > 8


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_prepare_continues_to_the_same_bytes(
    prepared: Path, arguments: dict, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    out = tmp_path / "killed"
    shards = sum(name.endswith(".tar") for name in fingerprints(prepared))
    for workers in (1, 2):
        call = json.dumps({**arguments, "out": str(out), "workers": workers})
        process = subprocess.Popen([sys.executable, "-c", RUN, call], cwd=ROOT, stderr=subprocess.DEVNULL)
        done = draw.randrange(shards)
        while process.poll() is None and len(list(out.glob("parts/*.tar.json"))) < done:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    prepare(out, **arguments)
    assert fingerprints(out) == fingerprints(prepared)


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    """The whole job, or one of its workers, at any moment from the first reading to the manifest."""
    write_corpus(tmp_path / "hills.txt", 8000, seed=1)
    (tmp_path / "lakes.jsonl").write_text('{"text": "Lakes are what this is about."}\n{"text": "no"}\n{\n' * 1500)
    arguments = {
        "sources": [f"hills=text:{tmp_path}/hills.txt", f"lakes=jsonl:{tmp_path}/lakes.jsonl"],
        "train_vocab": 2000, "max_length": 32, "shard_bytes": 6_000,
    }  # fmt: skip
    assert start_prepare(arguments, tmp_path / "calm").wait() == 0
    draw, killed, out = random.Random(0), 0, tmp_path / "killed"
    for number in range(20):
        process = start_prepare(arguments, out)
        # The first lives end while sources are read and the tokenizer is trained, the others within a few shards.
        moment = time.monotonic() + (0.4 * number if number < 6 else 60.0)
        enough = recorded(out) + (1 if number < 6 else draw.randint(1, 5))
        while process.poll() is None and time.monotonic() < moment and recorded(out) < enough:
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.02))
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        workers = [child for child in children if "--multiprocessing-fork" in child.cmdline()]
        if number % 5 == 4 and workers:
            draw.choice(workers).kill()  # the job must end by itself, and say so
            process.wait(timeout=60)
        process.kill()
        killed += process.wait() != 0
        assert not psutil.wait_procs(workers, timeout=60)[1], "workers outlive the job"
    assert killed == 20
    assert start_prepare(arguments, out).wait() == 0
    assert fingerprints(out) == fingerprints(tmp_path / "calm")
    assert read_manifest(out).sources[1].skipped == {"not JSON": 1500, "shorter than 4 tokens": 1500}


def recorded(out: Path) -> int:
    """Shards that are done."""
    return len(list(out.glob("parts/*.tar.json")))


def start_prepare(arguments: dict, out: Path) -> "subprocess.Popen[bytes]":
    call = json.dumps({**arguments, "out": str(out), "workers": 2})
    return subprocess.Popen([sys.executable, "-c", RUN, call], cwd=ROOT, stderr=subprocess.DEVNULL)


def test_a_shard_with_a_record_is_not_made_twice(prepared: Path, arguments: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = json.dumps({**arguments, "out": str(out)})
    process = subprocess.Popen([sys.executable, "-c", RUN, call], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("parts/*.tar.json"))) < 3:
        time.sleep(0.001)
    process.kill()
    process.wait()
    finished = {f.name.removesuffix(".json"): (out / f.name.removesuffix(".json")).stat().st_ino
                for f in out.glob("parts/*.tar.json")}  # fmt: skip
    prepare(out, **arguments)
    assert len(finished) >= 3 and all((out / name).stat().st_ino == inode for name, inode in finished.items())


def test_webdataset_reads_the_same_samples(prepared: Path) -> None:
    dataset = ShardDataset(prepared)
    urls = [str(prepared / shard.file) for shard in dataset.manifest.shards]
    count = 0
    for sample, found in enumerate(webdataset.WebDataset(urls, shardshuffle=False)):
        tokens = np.load(io.BytesIO(found["tokens.npy"]), allow_pickle=False)
        starts = np.load(io.BytesIO(found["sentences.npy"]), allow_pickle=False)
        assert tokens.dtype == np.uint16 and starts.dtype == np.int32
        assert np.array_equal(tokens, dataset.tokens(sample))
        assert np.array_equal(starts, dataset.sentences(sample))
        count += 1
    assert count == len(dataset) == dataset.manifest.samples


def test_samples_are_the_documents_in_order(prepared: Path, corpus: Path) -> None:
    dataset = ShardDataset(prepared)
    assert dataset.lengths.max() <= 30 and dataset.lengths.min() >= MIN_TOKENS
    ids = np.sort(np.concatenate([dataset.sources(split)["hills"] for split in ("train", "valid")]))
    text = "".join(dataset.tokenizer.decode(dataset.tokens(i)) for i in ids)
    documents = (corpus / "hills.txt").read_text().split("\n\n")
    assert text == "".join(" ".join(document.split()) for document in documents)
    starts = [dataset.sentences(i) for i in ids]
    assert all(
        s[0] == 0 and (np.diff(s) > 0).all() and s[-1] < dataset.lengths[i] for s, i in zip(starts, ids, strict=True)
    )


def test_manifest_counts_and_splits(prepared: Path, arguments: dict) -> None:
    manifest, dataset = read_manifest(prepared), ShardDataset(prepared)
    assert [source.name for source in manifest.sources] == ["hills", "lakes"]
    assert [source.documents for source in manifest.sources] == [400, 150]
    assert manifest.tokens == dataset.lengths.sum()
    for source in manifest.sources:
        train, valid = dataset.sources("train")[source.name], dataset.sources("valid")[source.name]
        assert len(train) + len(valid) == source.samples and len(valid) == source.valid_samples
        assert 0.04 < len(valid) / source.samples < 0.2 and not set(train) & set(valid)
    assert verify_folder(prepared) == []
    assert prepare(prepared, **arguments) == manifest


def test_the_same_text_is_never_in_both_splits(tmp_path: Path) -> None:
    block = "The same words appear once more here.\n\n"
    (tmp_path / "a.txt").write_text(block * 50 + "Another text is here for the other half, and it is long.\n")
    prepare(tmp_path / "out", [f"a=text:{tmp_path}/a.txt"], train_vocab=300, max_length=64, valid_permille=500)
    dataset = ShardDataset(tmp_path / "out")
    train, valid = ({dataset.text(i) for i in dataset.sources(s)["a"]} for s in ("train", "valid"))
    assert not train & valid


def test_hostile_documents_survive(tmp_path: Path) -> None:
    documents = [
        "a <mask> </s> <s> <pad> <unk> trick",
        "nul \x00 byte and \x1b[31m colour",
        "😀" * 500,
        "x" * 1_000_000,
    ]
    documents += ["word " * 200_000, "שלום עולם זה טקסט", "\ufeffbyte order mark at the start", ".", " "]
    (tmp_path / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "raw.txt").write_bytes(b"\xed\xa0\x80 surrogate bytes \xff\xfe here and more\n")
    prepare(tmp_path / "out", [f"a=text:{tmp_path}/*.txt"], train_vocab=300, max_length=128)
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.lengths.max() == 126
    every = np.concatenate([dataset.tokens(i) for i in range(len(dataset))])
    assert not np.isin(every, range(5)).any()
    text = dataset.tokenizer.decode(every)
    for piece in ("a <mask> </s> <s> <pad> <unk> trick", "nul byte and [31m colour", "😀" * 500, "x" * 1_000_000):
        assert piece in text
    assert text.count("word") == 200_000


def test_another_plan_is_refused(prepared: Path, arguments: dict, tmp_path: Path) -> None:
    before = fingerprints(prepared)
    for change, message in (
        ({"max_length": 64}, "max_length 32, now it is 64"),
        ({"sources": arguments["sources"][:1]}, "prepared with sources"),
        ({"train_vocab": 500}, "train_vocab 400, now it is 500"),
        ({"train_vocab": None, "tokenizer": str(prepared)}, "tokenizer_sha256 None"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(prepared, **{**arguments, **change})
    assert fingerprints(prepared) == before
    (tmp_path / "mine.txt").write_text("a letter")
    with pytest.raises(DataError, match="it holds other files"):
        prepare(tmp_path, **arguments)


def test_text_that_changed_between_two_runs_is_refused(arguments: dict, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    write_corpus(text, 100, seed=1)
    changed = {**arguments, "sources": [f"a=text:{text}", f"b=text:{tmp_path}/later.txt"], "out": tmp_path / "out"}
    (tmp_path / "later.txt").write_text("")
    with pytest.raises(DataError, match="source `b` must hold text, it is empty"):
        prepare(**changed)
    assert not (tmp_path / "out").exists()
    (tmp_path / "later.txt").write_text("...")
    with pytest.raises(DataError, match="source `b` must hold text"):
        prepare(**changed)
    write_corpus(text, 100, seed=2)
    with pytest.raises(DataError, match="source `a` changed"):
        prepare(**changed)


def test_a_given_tokenizer_is_kept(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    sources = [f"hills=text:{corpus}/hills.txt"]
    manifest = prepare(tmp_path / "out", sources, tokenizer=str(prepared), max_length=32)
    assert manifest.tokenizer_sha256 == read_manifest(prepared).tokenizer_sha256
    assert manifest.token_dtype == "uint16"


def test_bad_arguments(arguments: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def attempt(**change: object) -> None:
        prepare(tmp_path / "out", **{**arguments, **change})

    for change, message in (
        ({"tokenizer": "x"}, "exactly one of"),
        ({"train_vocab": None}, "exactly one of"),
        ({"train_vocab": None, "tokenizer": "nowhere"}, "tokenizer `nowhere`"),
        ({"max_length": 5}, "max length must be from 6"),
        ({"workers": 0}, "`workers` must be from 1"),
        ({"valid_permille": 1000}, "`valid_permille` must be"),
        ({"train_vocab": None, "tokenizer": "no/where"}, "`no/where` is no local path"),
        ({"sources": [f"x=text:{tmp_path}/none*"]}, "none"),
    ):
        with pytest.raises(DataError, match=message):
            attempt(**change)
    with pytest.raises(ConfigError, match="vocabulary size"):
        attempt(train_vocab=10)
    assert not (tmp_path / "out").exists()


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(4, 20), st.integers(0, 2**16))
def test_packing_keeps_every_token_in_order(lengths: list[int], budget: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    encoded = [draw.integers(0, 50, length) for length in lengths]
    word_starts = draw.random(50) < 0.4
    samples = list(pack(encoded, budget, word_starts))
    packed = [token for tokens, _ in samples for token in tokens]
    source = iter(np.concatenate([*encoded, []]).tolist())
    assert all(token in source for token in packed)  # a subsequence: only samples below MIN_TOKENS are missing
    for tokens, starts in samples:
        assert MIN_TOKENS <= len(tokens) <= budget
        assert starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < len(tokens)


def test_sentences_join_to_the_ids_of_the_whole_text(prepared: Path) -> None:
    tokenizer = TextTokenizer.from_path(prepared)
    parts = list(sentences(clean("Mary sings. It's 3.5 old stones! \"Really?\" John's river\n\nfalls -- slowly.")))
    joined = np.concatenate(encode_sentences(parts, tokenizer))
    assert len(parts) == 5
    assert np.array_equal(joined, tokenizer.encode(" ".join(parts)))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=2), st.sampled_from(["u2", "i4", "i8"]))
def test_npy_bytes_are_what_numpy_reads(shape: list[int], dtype: str) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    raw = npy_bytes(array)
    again = np.load(io.BytesIO(raw), allow_pickle=False)
    assert again.dtype == array.dtype and np.array_equal(again, array) and len(raw) == 128 + array.nbytes


def test_stdlib_docs_prepare_from_nothing(tmp_path: Path) -> None:
    manifest = prepare(tmp_path / "out", ["stdlib-docs"], train_vocab=1000, max_length=128)
    (source,) = manifest.sources
    assert source.words > 250_000 and source.licence == "Python Software Foundation License"
    assert manifest.plan.python == ".".join(map(str, sys.version_info[:3]))
    assert not (tmp_path / "out" / "parts").exists()


def test_wikipedia_text_prepares_and_comes_back(test_data: Path, tmp_path: Path) -> None:
    source = f"wiki=text:{test_data}/wikitext2_valid_test/wiki.valid.raw.gz"
    manifest = prepare(tmp_path / "out", [source], train_vocab=2000, max_length=128, workers=2, shard_bytes=1 << 18)
    dataset = ShardDataset(tmp_path / "out")
    assert manifest.sources[0].words > 150_000 and len(manifest.shards) > 3
    assert dataset.lengths.mean() > 60  # paragraphs fill their samples
    for sample in range(0, len(dataset), 97):
        starts, tokens = dataset.sentences(sample), dataset.tokens(sample)
        pieces = [dataset.tokenizer.decode(piece) for piece in np.split(tokens, starts[1:])]
        assert "".join(pieces).strip() == dataset.text(sample) and "\ufffd" not in dataset.text(sample)


def test_what_an_orphan_leaves_late_is_deleted(
    prepared: Path, arguments: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker outlives the job that was killed by a moment, in which the next one has begun."""
    real = preparing._finish

    def late(folder: Path, *rest: object) -> object:
        (folder / ".hills-000000.tar.1.tmp").touch()
        return real(folder, *rest)

    monkeypatch.setattr(preparing, "_finish", late)
    prepare(tmp_path / "out", **arguments)
    assert fingerprints(tmp_path / "out") == fingerprints(prepared)


def test_documents_that_were_decoded_wrongly_are_counted_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [b"The caf\xe9 at the river was full of people.", "Once \ufffd before, and now again \ufffd.".encode()]
    lines += [f"Nothing is wrong with line {number}, or with any other.".encode() for number in range(20)]
    (tmp_path / "a.txt").write_bytes(b"\n\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\n\n".join(lines[2:]))
    given = [f"{name}=text:{tmp_path / name}.txt" for name in "ab"]
    manifest = prepare(tmp_path / "out", given, train_vocab=300)
    told = [line for line in capsys.readouterr().err.splitlines() if "U+FFFD" in line]
    assert told == ["source a: 2 documents hold U+FFFD, text that was decoded wrongly; they are kept"]
    assert [(source.documents, source.skipped) for source in manifest.sources] == [(22, {}), (20, {})]


def test_a_folder_that_another_process_has_just_locked_is_left_alone(arguments: dict, tmp_path: Path) -> None:
    """It has not yet written what it prepares; another plan must not take that place."""
    parts = tmp_path / "out" / "parts"
    parts.mkdir(parents=True)
    with (parts / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is being prepared by another process"):
            prepare(tmp_path / "out", **arguments)
    assert [path.name for path in parts.iterdir()] == ["lock"]


def _at_once(out: Path, arguments: dict, gate: "threading.Barrier", told: "multiprocessing.Queue[str]") -> None:
    gate.wait()
    try:
        prepare(out, **arguments)
        told.put(f"max_length {arguments['max_length']}")
    except DataError as error:
        told.put(str(error))


@pytest.mark.parametrize("attempt", range(6))
def test_of_several_started_in_the_same_instant_one_wins(attempt: int, arguments: dict, tmp_path: Path) -> None:
    context, out = multiprocessing.get_context("fork"), tmp_path / "out"
    gate, told = context.Barrier(4), context.Queue()
    plans = [{**arguments, "max_length": length} for length in (24, 28, 32, 36)]
    jobs = [context.Process(target=_at_once, args=(out, plan, gate, told)) for plan in plans]
    for job in jobs:
        job.start()
    said = [told.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join()
    (winner,) = [line for line in said if line.startswith("max_length ")]
    for line in said:
        late = f"was prepared with {winner}," in line
        assert line == winner or late or line.endswith("is being prepared by another process"), said
    assert verify_folder(out) == [] and f"max_length {read_manifest(out).plan.max_length}" == winner

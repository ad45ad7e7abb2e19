"""`finetune.load`: the same texts as the command line, in lists; what it refuses; and that it imports nothing early."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune import load
from finetune.__main__ import main
from finetune.runners import by_graphs
from finetune.writer import Writer
from pretrain.errors import CheckpointError, ConfigError, UsageError
from tests.finetune.test_end_to_end import PAIRS, bundle_at

SOURCES = [source for source, _ in PAIRS[:9]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer")
    bundle_at(folder / "janus", ("ar", "nar"), "bos_first", init_std=0.3)
    bundle_at(folder / "bart", ("causal",), "eos_first", init_std=0.3)
    bundle_at(folder / "lengthless", ("ar", "nar"), "bos_first", trained=False)
    bundle_at(folder / "elmer", ("hard_exit",), "bos_first", init_std=0.3)
    (folder / "in").write_text("".join(f"{source}\n" for source in SOURCES), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def janus(place: Path) -> Writer:
    return load(place / "janus", device="cpu")


def lines(place: Path, mode: str, words: list[str], bundle: str = "janus") -> list[str]:
    out = place / "out"
    files = ["--input", str(place / "in"), "--output", str(out), "--max-length", "9", "--device", "cpu"]
    assert main(["generate", str(place / bundle), "--mode", mode, *files, *words]) == 0
    return out.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("ar", {}),
        ("ar", {"beam": 3, "n_best": 3, "no_repeat_ngram": 2, "length_penalty": 0.5}),
        ("ar", {"sample": True, "temperature": 0.8, "top_k": 30, "seed": 5, "n_best": 2}),
        ("nar", {"iterations": 2, "length_beam": 2, "length_choice": "topk", "early_stop": True}),
    ],
)
def test_it_writes_what_the_command_line_writes(place: Path, janus: Writer, mode: str, options: dict) -> None:
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    texts = janus.generate(SOURCES, mode, max_length=9, **options)
    assert len(texts) == len(SOURCES) * options.get("n_best", 1) and len(set(texts)) > 1
    assert texts == lines(place, mode, words)
    assert texts == janus.generate(SOURCES, mode, max_length=9, batch_tokens=1, **options)


def test_one_mode_need_not_be_named(place: Path, janus: Writer) -> None:
    bart = load(str(place / "bart"))
    assert bart.modes == ("ar",) and janus.modes == ("ar", "nar", "draft")
    assert load(place / "lengthless").modes == ("ar", "draft")
    assert load(place / "elmer").modes == ("hard_exit",)
    assert bart.generate(SOURCES, max_length=9) == lines(place, "ar", [], "bart")
    assert bart.generate([]) == []


def test_what_it_took_is_told(janus: Writer) -> None:
    batches: list[int] = []
    runner = janus.runner("nar", {"iterations": 1, "max_length": 9})
    written = janus.write(SOURCES, runner, batch_tokens=40, told=batches.append)
    assert written.sentences == sum(batches) == len(SOURCES) and len(written.scores) == len(SOURCES)
    assert written.passes == {2: len(batches)} and len(batches) > 1 and written.seconds > 0
    both = written + written
    assert both.sentences == 2 * len(SOURCES) and both.texts == [] and both.passes == {2: 2 * len(batches)}


def test_the_number_of_a_line_and_no_other_line_decides_a_sample(janus: Writer) -> None:
    runner = janus.runner("ar", {"sample": True, "max_length": 9})
    whole = janus.write(SOURCES, runner).texts
    assert janus.write(SOURCES[4:7], runner, first=4).texts == whole[4:7]
    assert janus.write(SOURCES[4:7], runner, first=0).texts != whole[4:7]


@pytest.mark.parametrize(
    ("mode", "options", "kind", "message"),
    [
        (None, {}, UsageError, r"`mode` must be one of ar, nar, draft with `.*janus`, got None"),
        ("soft", {}, UsageError, r"`mode` must be one of ar, nar, draft with `.*janus`, got 'soft'"),
        ("hard_exit", {}, UsageError, "needs a bundle with mode hard_exit"),
        ("ar", {"beams": 3}, ConfigError, "did you mean `decoding.beam`"),
        ("ar", {"n_best": 5}, ConfigError, "`n_best` must be at most `beam`, 4"),
        ("ar", {"top_k": 5}, ConfigError, "`top_k` must not be given without `sample`"),
        ("nar", {"max_length": 65}, ConfigError, "64 positions, got 65"),
        ("nar", {"batch_tokens": 0}, UsageError, "`batch_tokens` must be at least 1, got 0"),
    ],
)
def test_refusals(janus: Writer, mode: str | None, options: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        janus.generate(SOURCES, mode, **options)


@pytest.mark.parametrize("texts", ["one text", ["a", None], [b"a"]])
def test_texts_must_be_strings(janus: Writer, texts: object) -> None:
    with pytest.raises(TypeError, match="`texts` must be a sequence of strings"):
        janus.generate(texts, "nar")  # type: ignore[arg-type]


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--mode", "nar", "--sample"], 2, "`--sample` must not be given with `--mode` nar"),
        (["--mode", "nar", "--n-best", "2"], 2, "`--n-best` must not be given with `--mode` nar"),
        (["--mode", "ar", "--n-best", "9"], 3, "`n_best` must be at most `beam`, 4, unless with `sample`, got 9"),
        (["--mode", "ar", "--temperature", "0.5"], 3, "`temperature` must not be given without `sample`"),
        (["--mode", "ar", "--sample", "--beam", "2"], 3, "`beam` must not be given with `sample`"),
        (
            ["--mode", "ar", "--no-repeat-ngram", "-1"],
            3,
            "`decoding.no_repeat_ngram` must be greater than or equal to 0",
        ),
    ],
)
def test_refusals_of_the_command_line_are_one_line(
    place: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--input", str(place / "in"), "--output", str(place / "refused")]
    assert main(["generate", str(place / "janus"), *words, *files]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(place.glob("refused*"))


def test_importing_it_brings_no_torch() -> None:
    code = "import finetune, sys; assert callable(finetune.load) and not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


@pytest.mark.parametrize(("mode", "options"), [("ar", {"beam": 3, "n_best": 2}), ("nar", {"iterations": 2})])
def test_what_writes_by_graphs_writes_the_same(
    place: Path,
    janus: Writer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    options: dict,
) -> None:
    """On a CPU, where a graph is the function that it would be of."""
    expected = janus.generate(SOURCES, mode, max_length=9, **options)
    monkeypatch.setattr(Writer, "graphs", True)
    runner = janus.runner(mode, {"max_length": 9, **options})
    assert isinstance(runner, by_graphs.ByGraphs)
    assert janus.runner(mode, {"max_length": 9, **options}) is runner is not janus.runner(mode, options)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert janus.generate(SOURCES, mode, max_length=9, **options) == expected == lines(place, mode, words)
    assert capsys.readouterr().err.count("by CUDA graphs in batches of up to 8,192 padded tokens") == 1
    monkeypatch.setattr(by_graphs, "MOST_ROWS", 0)
    monkeypatch.setattr(runner, "write", None)
    assert janus.write(SOURCES, runner).texts == expected


def test_what_has_no_graphs_is_told(
    place: Path, janus: Writer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not janus.graphs
    with monkeypatch.context() as patch:
        patch.setattr(janus, "device", torch.device("cuda"))
        assert janus.graphs
        patch.setattr(janus, "eager", True)
        assert not janus.graphs
    monkeypatch.setattr(Writer, "graphs", True)
    assert lines(place, "ar", ["--sample"]) == janus.generate(SOURCES, "ar", max_length=9, sample=True)
    assert "ar: eagerly: there is no form" in capsys.readouterr().err

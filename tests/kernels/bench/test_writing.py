"""The harness that times every way to write: its table is whole, and it refuses where two sides do not agree."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.decoding import Generated

BENCH = Path(__file__).resolve().parents[3] / "kernels" / "bench"
pytest.importorskip("ctranslate2", reason="needs the extra `bench`")


@pytest.fixture(scope="module")
def writing() -> Iterator[ModuleType]:
    """`kernels/bench` is no package: its files find each other on the path."""
    path = sys.path[:]
    sys.path.insert(0, str(BENCH))
    import writing

    yield writing
    sys.path[:] = path


@pytest.fixture(scope="module")
def small(writing: ModuleType) -> SimpleNamespace:
    """A model, its peers and two sources."""
    config = writing.CONFIG.model_copy(update=writing.SMALL)
    twins = writing.Twins(config, 12, 12)
    return SimpleNamespace(twins=twins, source=twins.sources(2))


def test_the_small_size_fills_the_table(
    writing: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "writing.json"
    assert writing.main(["--small", "--batch", "2", "--source", "9", "--out", str(out)]) == 0
    told = json.loads(out.read_text(encoding="utf-8"))
    assert (told["settings"]["source"], told["settings"]["threads"]) == (9, torch.get_num_threads())
    assert told["settings"]["model"]["vocab_size"] == 512
    rows = {(row["model"], row["by"], row["way"]): row for row in told["rows"]}
    assert len(rows) == len(told["rows"])
    for model in ("2+2", "4+1"):
        for by in ("transformers", "parlance", "ctranslate2"):
            for beam in (1, 5):
                assert rows[model, by, f"AR, beam {beam}"]["passes"] == 12
    for count in (0, 1, 4, 10):
        assert rows["2+2", "parlance", f"NAR, {count} iterations"]["passes"] == count + 1
    ours = {way for model, by, way in rows if (model, by) == ("2+2", "parlance")}
    assert {"soft exit", "hard exit, nobody leaves", "hard exit, all leave at layer 1"} < ours
    right, wrong = (rows["2+2", "parlance", f"JANUS AR, drafts {kind}"] for kind in ("right", "wrong"))
    assert right["passes"] < wrong["passes"] == rows["2+2", "parlance", "JANUS AR, beam 1"]["passes"] - 1
    yardstick = rows["2+2", "transformers", "AR, beam 5"]
    for row in rows.values():
        assert row["check"] and row["encoder_share"] >= 0
        assert row["ms_a_sentence"] * row["sentences_a_second"] == pytest.approx(1000)
        assert row["speedup"] == pytest.approx(yardstick["ms_a_sentence"] / row["ms_a_sentence"])
        if row["by"] != "ctranslate2":  # whose encoder is not measured by itself
            assert 0 < row["encoder_share"] < 1
    printed = capsys.readouterr().out
    assert f"threads {torch.get_num_threads()}" in printed and printed.count("\n") == len(rows) + 2


def test_the_rows_of_make_bench_come_from_the_same_twins(writing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    latency, exits = sys.modules["latency"], sys.modules["exit_latency"]
    base = writing.Twins(writing.CONFIG.model_copy(update={**writing.SMALL, "decoder_layers": 3}), 8, 8)
    for module in (latency, exits):
        monkeypatch.setattr(module, "BASE", base)
        monkeypatch.setattr(module, "REPEATS", 1)
    rows = [latency.nar_row(), latency.ar_row(), *latency.ct2_rows(), *exits.rows()]
    assert [row.name for row in rows[:4]] == ["nar_latency", "ar_latency", "ct2_latency", "exit_latency"]
    assert all(row.ratio > 0 for row in rows) and len(rows) == 8
    assert "same 8 token ids" in rows[0].detail and "same 6 token ids and score" in rows[1].detail


def other_token(made: Generated) -> Generated:
    """The same texts but for the last token of the last."""
    tokens = [line.copy() for line in made.tokens]
    tokens[-1][-1] = 7 if tokens[-1][-1] != 7 else 8
    return replace(made, tokens=tokens)


def other_score(made: Generated) -> Generated:
    return replace(made, scores=[score * 1.001 for score in made.scores])


def one_pass_more(made: Generated) -> Generated:
    return replace(made, passes=made.passes + 1)


def other_id(sequences: Any) -> Any:
    """Of transformers (a tensor, or an output that holds one) or CTranslate2 (lists)."""
    if isinstance(sequences, list):
        return [*sequences[:-1], [*sequences[-1][:-1], 7 if sequences[-1][-1] != 7 else 8]]
    tensor = sequences if isinstance(sequences, torch.Tensor) else sequences.sequences
    tensor[-1, -2] = 7 if tensor[-1, -2] != 7 else 8
    return sequences


BROKEN: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("ar_ways", "Twins.our_beam", other_token),
    ("ar_ways", "Twins.our_beam", one_pass_more),
    ("ar_ways", "Twins.their_beam", other_id),
    ("ar_ways", "Twins.ct2_words", other_id),
    ("janus_ways", "Twins.our_beam", other_token),
    ("janus_ways", "Twins.our_beam", other_score),
    ("janus_ways", "Twins.our_pass", other_token),
    ("janus_ways", "Twins.our_pass", other_score),
    ("janus_ways", "Twins.our_pass", one_pass_more),
    ("janus_ways", "drafted", other_token),
    ("exit_ways", "exit_latency.hard", other_token),
    ("exit_ways", "exit_latency.soft", other_token),
]


@pytest.mark.parametrize(("ways", "broken", "how"), BROKEN)
def test_a_wrong_writer_is_refused(
    writing: ModuleType,
    small: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    ways: str,
    broken: str,
    how: Callable[[Any], Any],
) -> None:
    place, _, name = broken.rpartition(".")
    owner = {"": writing, "Twins": writing.Twins, "exit_latency": sys.modules["exit_latency"]}[place]
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **options: how(right(*given, **options)))
    with pytest.raises(SystemExit, match="benchmark refused"):
        list(getattr(writing, ways)(small.twins, small.source))


@pytest.mark.parametrize(("beam", "how"), [(5, other_score), (5, other_token), (1, other_token)])
def test_each_beam_is_checked(
    writing: ModuleType, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, beam: int, how: Callable[[Any], Any]
) -> None:
    right = writing.Twins.our_beam
    monkeypatch.setattr(writing.Twins, "our_beam", lambda *given: how(right(*given)))
    with pytest.raises(SystemExit, match="benchmark refused"):
        writing.check_beam(small.twins, small.source, beam)


def test_drafts_that_are_not_what_the_row_says_are_refused(
    writing: ModuleType, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "check_draft", lambda made, greedy, right: real(made, greedy, not right))
    from writing_checks import check_draft as real

    with pytest.raises(SystemExit, match="drafts must be"):
        list(writing.janus_ways(small.twins, small.source))


def test_no_figure_comes_before_the_checks(
    writing: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = writing.soft  # the last that is checked
    monkeypatch.setattr(sys.modules["exit_latency"], "soft", lambda *given: other_token(right(*given)))
    monkeypatch.setattr(writing, "medians", lambda *given, **options: pytest.fail("measured before the checks"))
    with pytest.raises(SystemExit, match="soft exit and a plain loop must write the same token ids"):
        writing.main(["--small", "--batch", "1", "--out", str(tmp_path / "writing.json")])
    assert not list(tmp_path.iterdir()) and "sentence" not in capsys.readouterr().out


def test_one_text_of_sixteen_may_be_a_tie(writing: ModuleType) -> None:
    from writing_checks import agree

    many = [[number, 5] for number in range(16)]
    assert agree([[99, 5], *many[1:]], many, "they") == "same ids in 15 of 16 texts"
    for found, expected in (([[99, 5], [99, 5], *many[2:]], many), ([[99, 5], *many[1:15]], many[:15])):
        with pytest.raises(SystemExit, match="they must write the same token ids"):
            agree(found, expected, "they")
    for found in ([], many[:15], [[], *many[1:]]):
        with pytest.raises(SystemExit, match="every source must have a text"):
            agree(found, many, "they")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["d_modle=64"], "did you mean `d_model`"),
        (["d_model"], "must look like key=value"),
        (["decoder_layers=1"], "`decoder_layers` must be at least 2"),
        (["--batch", "0"], "at least 1"),
        (["--threads", "0"], "at least 1"),
        (["--tokens", "254"], "`--tokens` 253"),
        (["--source", "1025"], "at most 1024"),
    ],
)
def test_what_cannot_be_is_told(
    writing: ModuleType, capsys: pytest.CaptureFixture[str], given: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        writing.main(given)
    assert ended.value.code == 2 and told in capsys.readouterr().err

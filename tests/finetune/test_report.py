"""`report`: its texts against those of `generate`, its cache under kills, its costs by hand, refusals."""

import inspect
import json
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from finetune.__main__ import OPTIONS, main
from finetune.generate import NEEDS
from finetune.report import command
from finetune.report import texts as texts_module
from finetune.report.measured import equal_quality
from finetune.report.page import cell
from finetune.report.record import Cost, Record, _cost, read_curves
from finetune.report.texts import read_texts
from finetune.report.ways import OWN
from finetune.runners import WRITING
from finetune.scores import score
from tests.finetune.test_end_to_end import bundle_at, config_at, place

__all__ = ["place"]
FEW = ["--sentences", "4", "--beams", "1", "2", "--iterations", "0", "2"]


@pytest.fixture(scope="module")
def tuned(place: Path) -> Path:
    bundle_at(place / "elmer", ("hard_exit",), "bos_first")
    few = {"steps": 2, "save_every": 1, "validate_every": 1, "sample_every": 1, "log_every": 1, "validate_batches": 1}
    for name, bundle, runner in (
        ("both", "janus", {"name": "janus", "decoding": {"ar": {"max_length": 12}, "nar": {"length_beam": 2}}}),
        ("early", "elmer", {"name": "hard_exit", "decoding": {"max_length": 14}}),
    ):
        assert main(["train", str(config_at(place, name, name, bundle, runner=runner, train=few))]) == 0
    return place / "runs"


def page_of(out: Path) -> str:
    return (out / "report.md").read_text(encoding="utf-8")


def kept(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "texts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_page(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, runs = tmp_path / "out", [str(tuned / "both"), str(tuned / "early")]
    assert main(["report", *runs, *FEW, "--out", str(out)]) == 0
    page = page_of(out)
    given = f"report {' '.join(runs)} --out {out} --sentences 4 --beams 1 2 --iterations 0 2`"
    assert given in page
    ways = [("both", way) for way in ("ar, beam 1", "ar, beam 2", "nar, 0 iterations", "nar, 2 iterations", "draft")]
    ways.append(("early", "hard_exit, threshold 0.5"))
    assert {path.name for path in out.iterdir()} == {"report.md", "quality.png", "training.png", "texts.jsonl"}
    assert "](quality.png)" in page and "](training.png)" in page and "### To equal quality" in page

    # each command of the page writes the texts that were scored
    lines = (tuned / "both" / "task" / "test.source").read_text().splitlines()[:4]
    targets = (tuned / "both" / "task" / "test.target").read_text().splitlines()[:4]
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in lines))
    commands = [line for line in page.splitlines() if line.startswith("python -m finetune generate")]
    assert len(commands) == len(ways)
    shown = [row for row in page.splitlines() if row.startswith(("| both |", "| early |"))]
    for (run, way), written_by in zip(ways, commands, strict=True):
        words = written_by.replace("--input FILE --output FILE", f"--input {tmp_path}/in --output {tmp_path}/written")
        assert main([*shlex.split(words)[3:], "--restart"]) == 0
        written = (tmp_path / "written").read_text(encoding="utf-8").splitlines()
        values = score(written, targets, ["bleu", "rouge1", "rouge2", "rougeL", "repetition", "length_ratio"]).values
        row = next(row for row in shown if row.startswith(f"| {run} | {way} |"))
        assert row.split(" | ")[2:8] == [f"{value:.2f}" for value in values.values()]

    # a second call writes nothing and finds the same
    before = (out / "texts.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["report", *runs, *FEW, "--out", str(out)]) == 0
    assert (out / "texts.jsonl").read_bytes() == before and page_of(out) == page
    assert "to be written" not in capsys.readouterr().err


def test_a_kill_costs_one_text(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts, run = tmp_path / "whole", tmp_path / "parts", str(tuned / "both")
    assert main(["report", run, *FEW, "--out", str(whole)]) == 0
    write, count = texts_module._written, 0

    def stopped(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(texts_module, "_written", stopped)
        assert main(["report", run, *FEW, "--out", str(parts)]) == 85
    assert not (parts / "report.md").exists() and count == 7
    stood = (parts / "texts.jsonl").read_bytes()
    (parts / "texts.jsonl").write_bytes(stood[:-9])  # as a kill would cut it
    assert main(["report", run, *FEW, "--out", str(parts)]) == 0
    assert (parts / "texts.jsonl").read_bytes().startswith(stood[:-9] + b"\n")
    of = [{key: text.text for key, text in read_texts(out / "texts.jsonl").items()} for out in (whole, parts)]
    assert of[0] == of[1] and len(of[0]) == 20
    calls = [text.call for text in read_texts(parts / "texts.jsonl").values()]
    assert (calls.count(1), calls.count(2)) == (6, 14)
    assert "Not all of these times were taken side by side" in page_of(parts)
    assert "side by side" not in page_of(whole).replace("shown side by side", "")
    # more sentences: what is there stays
    assert main(["report", run, *FEW, "--sentences", "5", "--out", str(whole)]) == 0
    assert sum("source" in line for line in kept(whole)) == 25
    assert main(["report", run, *FEW, "--out", str(parts), "--restart"]) == 0
    assert {line["call"] for line in kept(parts) if "source" in line} == {1}


def test_another_bundle_writes_anew(tuned: Path, place: Path, tmp_path: Path) -> None:
    config = str(config_at(place, "more", "nar", train={"steps": 1, "save_every": 1}))
    few = ["report", str(tuned / "more"), "--sentences", "2", "--iterations", "1", "--out", str(tmp_path)]
    assert main(["train", config]) == 0 and main(few) == 0
    one = page_of(tmp_path)
    assert main(["train", config, "train.steps=2"]) == 0 and main(few) == 0
    assert (
        sum("bundle" in line for line in kept(tmp_path)) == 2 and sum("source" in line for line in kept(tmp_path)) == 4
    )
    assert "| updates | 1 |" in one and "| updates | 2 |" in page_of(tmp_path)
    assert "No run has written and scored validation texts" in page_of(tmp_path)


def test_lines_that_are_no_text_count_for_nothing(tmp_path: Path) -> None:
    good = {"way": "w", "source": "s", "call": 1, "text": "a", "seconds": 0.5, "passes": 1, "cut": False, "exits": None}
    bad = [{**good, "seconds": value} for value in (0.0, -1.0, float("nan"), float("inf"), "1", None)]
    bad += [{**good, "text": 1}, {**good, "exits": {"tokens": "x"}}, {**good, "exits": 3}, {"way": "w"}]
    lines = [json.dumps({**line, "source": "t"}) for line in bad] + ["[" * 9999, "", "7", '{"way": []}']
    (tmp_path / "texts.jsonl").write_text("\n".join([*lines, json.dumps(good), json.dumps(good)[:-5]]))
    assert list(read_texts(tmp_path / "texts.jsonl")) == [("w", "s")]
    assert read_texts(tmp_path / "none") == {}


def event(kind: str, step: int, time: float, **more: Any) -> dict[str, Any]:
    return {"event": kind, "step": step, "time": time, **more}


def test_cost_counts_what_was_kept_on_all_ranks() -> None:
    events = [
        event("start", 0, 0.0, ranks=2, device="cpu"),
        event("save", 10, 9.0, seconds=4.0, save_seconds=1.0),
        event("save", 20, 20.0, seconds=8.0, save_seconds=1.5),  # damaged: the next life began before it
        event("resume", 10, 30.0, ranks=2, device="cpu"),
        event("save", 30, 50.0, seconds=10.0, save_seconds=0.5),
    ]
    cost = _cost(events, {"step": 10, "samples": 80, "tokens": 900})
    assert (cost.ranks, cost.updates, cost.kept, cost.samples, cost.tokens) == (2, 30, 10, 80, 900)
    assert (cost.device_seconds, cost.save_seconds, cost.restarts) == (28.0, 1.5, 1)
    assert [cost.until(step) for step in (0, 5, 10, 20, 30, 99)] == [0.0, 4.0, 8.0, 18.0, 28.0, 28.0]
    assert _cost([event("start", 0, 0.0)], {}).until(5) == 0.0


def record_with(name: str, seconds: float, **curves: list[tuple[int, float]]) -> Record:
    cost = Cost("cpu", 1, 10, 10, 0, 0, seconds, 0.0, 0, ((0, 0.0), (10, seconds)))
    tags = {f"written/{mode}/bleu": curve for mode, curve in curves.items()}
    return Record(name, Path(name), "pairs", ("bleu",), tags, cost, {})


def test_equal_quality_is_what_all_reached() -> None:
    quick = record_with("quick", 100.0, ar=[(5, 10.0), (10, 20.0)], nar=[(5, 11.0), (10, 9.0)])
    slow = record_with("slow", 1000.0, nar=[(2, 1.0), (4, 12.0), (6, 30.0)])
    level, reached = equal_quality([quick, slow], "bleu")
    assert level == 11.0
    assert [(one.record.name, one.mode, one.updates, one.device_seconds) for one in reached] == [
        ("quick", "nar", 5, 50.0), ("quick", "ar", 10, 100.0), ("slow", "nar", 4, 400.0),
    ]  # fmt: skip
    assert equal_quality([slow], "bleu")[1] == [] and equal_quality([quick, slow], "rouge1")[1] == []


def test_curves_are_whole_and_a_restart_hides_what_it_wrote_anew(tmp_path: Path) -> None:
    for first, steps, factor in ((0, 10_300, 1.0), (10_200, 10_250, 2.0)):
        writer = SummaryWriter(str(tmp_path), purge_step=first + 1, filename_suffix=f".{first}")
        for step in range(first + 1, steps + 1):
            writer.add_scalar("loss/ar", factor * step, step)
        writer.close()
    curve = read_curves(tmp_path)["loss/ar"]
    assert [step for step, _ in curve] == list(range(1, 10_251))
    assert curve[10_199][1] == 10_200 and curve[10_200][1] == 20_402
    assert read_curves(tmp_path / "none") == {}


@given(st.text(max_size=20))
def test_a_cell_is_one_line_and_no_markup(text: str) -> None:
    shown = cell(text)
    assert shown.isprintable() and not re.search(r"(?<!\\)(\\\\)*[|`*_<>\[\]]", shown)
    assert re.sub(r"\\(.)", r"\1", shown).split() == "".join(s if s.isprintable() else " " for s in text).split()


def test_what_a_run_gives_of_its_own_is_what_generate_takes() -> None:
    assert all(set(OWN[mode]) <= set(OPTIONS[mode]) for mode in OPTIONS)
    assert set(OWN) == set(OPTIONS) == set(NEEDS) == set(WRITING)


def test_usual_options_are_those_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a page's command leaves out what it may."""
    usual = list(inspect.signature(command.report).parameters.values())[1:]
    given: list[Any] = []
    monkeypatch.setattr(command, "report", lambda *arguments: given.extend(arguments))
    assert main(["report", "some"]) == 0
    as_tuples = [tuple(value) if isinstance(value, list) else value for value in given[1:]]
    assert given[0] == ["some"] and as_tuples == [parameter.default for parameter in usual]


def damaged(tuned: Path, tmp_path: Path, name: str) -> str:
    """The folder of a run like `both`, in which one thing is wrong."""
    folder = tmp_path / name
    folder.mkdir()
    for path in (tuned / "both").iterdir():
        if path.name not in ("config.yaml", "task", "events.jsonl", "bundle" if name == "bundleless" else ""):
            (folder / path.name).symlink_to(path)
    config = yaml.safe_load((tuned / "both" / "config.yaml").read_text())
    config["task"] = (
        {"name": "multi30k"} if name == "other-task" else {"name": "x"} if name == "unknown" else config["task"]
    )
    if name == "taskless":
        del config["task"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if name != "eventless":
        (folder / "events.jsonl").write_text((tuned / "both" / "events.jsonl").read_text())
    (folder / "task").mkdir()
    for side in ("source", "target"):
        text = (tuned / "both" / "task" / f"test.{side}").read_text()
        text = text.replace("alpha", "omega") if name == "other-pairs" else "" if name == "pairless" else text
        (folder / "task" / f"test.{side}").write_text(text if (name, side) != ("uneven", "target") else text + "x\n")
    return str(folder)


@pytest.mark.parametrize(
    ("names", "more", "code", "message"),
    [
        (["none"], [], 5, "must be the folder of a run, it has no events.jsonl"),
        (["eventless"], [], 5, "must be the folder of a run, it has no events.jsonl"),
        (["bundleless"], [], 5, "has no bundle yet: `python -m finetune train` writes it at its end"),
        (["taskless"], [], 5, "its config.yaml names no `task`"),
        (["unknown"], [], 3, "must be one of xsum, squad-qg,"),
        (["both", "both"], [], 4, "is given 2 times"),
        (["both", "other-task"], [], 4, "make a report for each"),
        (["both", "other-pairs"], [], 4, "must have the same test pairs to be compared: line 1 of"),
        (["uneven"], [], 4, "must have as many lines as"),
        (["pairless"], [], 4, "must hold at least one line, it is empty: `--split valid` may have some"),
        (["both"], ["--sentences", "0"], 2, "`--sentences` must be at least 1, got 0"),
        (["both"], ["--shown", "-1"], 2, "`--shown` must be at least 0, got -1"),
        (["both"], ["--beams", "0"], 2, "`--beams` must be at least 1, got 0"),
        (["both"], ["--iterations", "-1"], 2, "`--iterations` must be at least 0, got -1"),
        (["both"], ["--metrics", "blue"], 3, "got 'blue'"),
        (["both"], ["--out", "FILE"], 2, "must be a folder or new"),
    ],
)
def test_refusals(
    tuned: Path,
    tmp_path: Path,
    names: list[str],
    more: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (tmp_path / "file").write_text("")
    there = {name: str(tuned / name) if name in ("both", "none") else damaged(tuned, made, name) for name in set(names)}
    more = [str(tmp_path / "file") if word == "FILE" else word for word in more]
    capsys.readouterr()
    assert main(["report", *(there[name] for name in names), "--out", str(tmp_path / "out"), *more]) == code
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()

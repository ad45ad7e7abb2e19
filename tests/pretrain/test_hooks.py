"""Hooks, console and TensorBoard on made-up reports."""

import errno
import io
import math
import os
import re
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from pretrain.distributed import World
from pretrain.errors import CheckpointError, Requeue
from pretrain.hooks import AllRanks, Save, Skips, StopOnSignal, TextSamples, Validation
from pretrain.loop import Progress, StepReport
from pretrain.objectives import Preview
from pretrain.signals import Signals
from pretrain.watch.console import Console, Meter, clock, short
from pretrain.watch.tensorboard import TensorBoard, plain


def report(step, last=False, **changes):
    made = StepReport(
        progress=Progress(step, 10 * step, 10 * step, 100 * step), last=last,
        losses={"ar": 6.2, "nar": 9.8, "length": 4.0}, weights={"ar": 1.0, "nar": 0.5, "length": 0.0},
        counts={"ar": 90, "nar": 40, "length": 10}, lr=1e-3, grad_norm=3.14, applied=True, loss_scale=None,
        samples=10, tokens=100, seconds=0.5, wait_seconds=0.1, facts={"flops": 1000, "masked": 30},
    )  # fmt: skip
    return replace(made, **changes)


def read(folder):
    board = EventAccumulator(str(folder))
    board.Reload()
    return board


def test_plain_lines_say_what_happened():
    out = io.StringIO()
    console = Console(first_step=0, steps=20, every=10, out=out)
    for step in range(1, 21):
        console.after_step(report(step, last=step == 20))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 10/20 loss 11.10 (ar 6.2 nar 9.8) grad 3.1 200 tok/s data 20% eta ")
    assert lines[1].endswith("eta 0:00")


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    console = Console(first_step=3, steps=5, every=1, out=out)
    console.after_step(report(4))
    console.note("hello")
    console.after_step(report(5, last=True))
    console.close()
    assert "5/5" in out.getvalue() and "hello\n" in out.getvalue() and "loss 11.10" in out.getvalue()


@given(st.floats(0, 1e7))
def test_clock_and_short_are_readable(value):
    hours, rest = divmod(round(value), 3600)
    expected = [hours, *divmod(rest, 60)] if hours else list(divmod(rest, 60))
    assert [int(part) for part in clock(value).split(":")] == expected
    assert [int(part) for part in clock(value, hours=True).split(":")] == [hours, *divmod(rest, 60)]
    unit = {"k": 1e3, "M": 1e6}.get(short(value)[-1], 1)
    assert float(short(value).rstrip("kM")) * unit == pytest.approx(value, rel=0.06, abs=0.51)


def test_a_meter_forgets_what_it_told():
    meter = Meter()
    meter.add(report(1))
    meter.add(report(2, seconds=1.5))
    rates = meter.read()
    assert (rates.tokens_per_second, rates.samples_per_second, rates.wait_fraction) == (100, 10, pytest.approx(0.1))
    assert meter.read().tokens_per_second == 0


def test_one_curve_over_restarts(tmp_path):
    first = TensorBoard(tmp_path, first_step=0, every=1)
    first.config("seed: 1", {"seed": 1, "model": {"d_model": 8}}, ["loss/total"])
    for step in range(1, 8):
        first.after_step(report(step, losses={"ar": 100.0 + step}))
    first.text(3, "samples/ar", "old\ntext")
    first.close()
    time.sleep(1.1)  # readers order event files by name, and names tell seconds: a restart takes longer than one
    second = TensorBoard(tmp_path, first_step=4, every=1)
    second.config("seed: 1", {"seed": 1, "model": {"d_model": 8}}, ["loss/total"])
    for step in range(5, 9):
        second.after_step(report(step, losses={"ar": 200.0 + step}, loss_scale=64.0))
    second.close()
    board = read(tmp_path)
    points = [(e.step, e.value) for e in board.Scalars("loss/ar")]
    assert points == [*((s, 100.0 + s) for s in range(1, 5)), *((s, 200.0 + s) for s in range(5, 9))]
    assert [e.step for e in board.Scalars("train/loss_scale")] == [5, 6, 7, 8]
    assert board.Scalars("train/mask_ratio")[0].value == pytest.approx(0.3)
    assert board.Scalars("memory/rss_mebibytes")[0].value > 10
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in board.Tensors("config/text_summary")]
    assert texts == [(1, "    seed: 1"), (5, "    seed: 1")]
    assert board.Tensors("samples/ar/text_summary")[0].tensor_proto.string_val[0] == b"    old\n    text"


def test_saves_are_periodic_last_and_never_twice():
    written = []
    save = Save(3, lambda progress: written.append(progress.step))
    for step in range(1, 8):
        save.after_step(report(step, last=step == 7))
    save.now(report(7).progress)
    assert written == [3, 6, 7]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_after_the_update_and_requeues(number):
    written = []
    before = signal.getsignal(number)
    with Signals():
        stop = StopOnSignal(Save(100, lambda progress: written.append(progress.step)))
        stop.after_step(report(1))
        os.kill(os.getpid(), number)
        assert written == []
        with pytest.raises(Requeue, match="saved step 2"):
            stop.after_step(report(2))
    assert written == [2] and Requeue.exit_code == 85
    assert signal.getsignal(number) is before


def test_a_signal_in_the_last_update_changes_nothing():
    with Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        StopOnSignal(Save(1, lambda progress: pytest.fail("saved"))).after_step(report(9, last=True))


def test_skipped_updates_are_told():
    told = []
    hook = Skips(told.append)
    hook.after_step(report(1))
    hook.after_step(report(2, applied=False, loss_scale=8.0, grad_norm=math.inf))
    assert [one.step for one in told] == [2]


@dataclass
class Batch:
    number: int
    n_tokens: int = 5

    def to(self, device):
        return self


class Fake:
    """An objective, module and engine in one, for hooks that only ask and show."""

    weights = {"ar": 1.0, "nar": 2.0}

    def __init__(self):
        model = nn.Linear(1, 1)
        module = nn.Module()
        module.add_module("model", model)
        module.objective = self
        self.module, self.gathered, self.world = module, nullcontext, World(0, 1, 0, torch.device("cpu"))
        self.modes = []

    def counts(self, batch):
        return {"ar": batch.number, "nar": 0}

    def evaluate(self, batches):
        return {"ar": torch.tensor(sum(2.5 * batch.number for batch in batches)), "nar": torch.tensor(0.0)}

    def preview(self, model, batch, limit):
        self.modes.append(model.training)
        one = Preview(
            source=[1, 2],
            target=[1, 3, 6],
            predicted={"ar": [1, 4, 6], "nar": [1, 5, 6]},
            places={"ar": [1, 2], "nar": [1]},
        )
        return [one] * min(limit, batch.number)


def test_validation_is_a_global_mean_on_the_board_and_the_console(tmp_path):
    board, said = TensorBoard(tmp_path, 0, 1), []
    hook = Validation(Fake(), [Batch(3), Batch(1)], 2, board, said.append)
    for step in (1, 2, 3):
        hook.after_step(report(step))
    board.close()
    assert said == ["valid at step 2: loss 2.50 (ar 2.5)"]
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("valid/ar")] == [(2, 2.5)]
    assert "valid/nar" not in read(tmp_path).Tags()["scalars"]


@given(st.text())
def test_foreign_text_stays_text_in_a_markdown_table(text):
    import html

    import markdown

    made = markdown.markdown(f"| a |\n| --- |\n| x{plain(text)}x |", extensions=["markdown.extensions.tables"])
    cell = made.partition("<td>")[2].rpartition("</td>")[0]
    assert "<" not in cell and len(made.split("<td>")) == 2
    assert "".join(html.unescape(cell).split()) == "".join(f"x{html.unescape(plain(text))}x".split())


SIGNS = st.sampled_from(
    ["word", "日本", "é", "\u0301", "\x00", " ", "\n", *"*_|`~#<>&\\[]()!-+.:\"'{}$", "<b>", "&amp;"]
)


@given(st.lists(st.lists(SIGNS, max_size=4).map("".join), min_size=2, max_size=5), st.sets(st.integers(0, 4)))
def test_any_text_is_shown_as_it_is_and_bold_where_it_should_be(words, places):
    """As TensorBoard renders it: the words, nothing lost or read as markdown or HTML, bold in the right places."""
    import html

    from tensorboard.plugin_util import markdown_to_safe_html

    hook = TextSamples(Fake(), Batch(1), lambda ids: " x".join(words[id] for id in ids), 1, None, None)
    bold = [index in places for index in range(len(words))]
    table = f"| a |\n| --- |\n| ^{hook._bold(list(range(len(words))), bold)}^ |"
    cell = markdown_to_safe_html(table).partition("<td>")[2].rpartition("</td>")[0]
    assert "<td>" not in cell
    seen = html.unescape(re.sub("</?strong>", "", cell))
    pieces = ["".join(c if c.isprintable() else " " for c in hook.decode(list(run))) for run in runs_of(bold)]
    assert "".join(seen.split()) == "^" + "".join("".join(pieces).split()) + "^"
    strong = [html.unescape(one).split() for one in re.findall("<strong>(.*?)</strong>", cell)]
    wanted = [piece.split() for piece, run in zip(pieces, runs_of(bold), strict=True) if bold[run[0]]]
    assert strong == [piece for piece in wanted if piece]


def runs_of(marks):
    """[indices of equal neighbours]"""
    return [[index for index, _ in run] for _, run in groupby(enumerate(marks), key=lambda pair: pair[1])]


def test_mfu_is_flops_a_second_of_the_peak(tmp_path):
    board = TensorBoard(tmp_path, 0, 2, peak=8000.0)
    out = io.StringIO()
    console = Console(0, 2, 2, out, peak=8000.0)
    for step in (1, 2):
        board.after_step(report(step))
        console.after_step(report(step))
    board.close()
    assert [e.value for e in read(tmp_path).Scalars("speed/mfu")] == [0.25], "1000 in half a second"
    assert " 200 tok/s mfu 25% data 20% eta" in out.getvalue()
    shown = {
        "speed/tokens_per_second": 200.0, "speed/samples_per_second": 20.0, "speed/data_wait_fraction": 0.2,
        "speed/teraflops_per_second": 2e-9, "train/lr": 1e-3, "train/grad_norm": 3.14, "train/tokens": 200.0,
    }  # fmt: skip
    assert {tag: read(tmp_path).Scalars(tag)[-1].value for tag in shown} == pytest.approx(shown)
    assert "speed/mfu" not in scalars_without_peak(tmp_path / "none")


def scalars_without_peak(folder):
    board = TensorBoard(folder, 0, 1)
    board.after_step(report(1, facts={}))
    board.close()
    assert "train/mask_ratio" not in read(folder).Tags()["scalars"]
    return read(folder).Tags()["scalars"]


def test_hparams_pictures_and_tables_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams import plugin_data_pb2

    board = TensorBoard(tmp_path / "tb", 0, 1)
    values = {"optim": {"lr": 1e-3, "betas": [0.9, 0.98]}, "data": {"weights": None}, "name": "x"}
    board.config("text", values, ["loss/total", "valid/total"])
    board.picture("masks/encoder", np.full((4, 6, 3), 200, np.uint8))
    board.after_step(report(1))
    board.close()
    found = EventMultiplexer({"run": str(tmp_path / "tb")}).Reload()
    content = found.SummaryMetadata("run", "_hparams_/session_start_info").plugin_data.content
    given = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert {key: given[key].WhichOneof("kind") for key in given} == {
        "optim.lr": "number_value", "optim.betas": "string_value", "name": "string_value"
    }  # fmt: skip
    content = found.SummaryMetadata("run", "_hparams_/experiment").plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["loss/total", "valid/total"]
    assert found.Scalars("run", "loss/total")[-1].value == pytest.approx(11.1)
    assert found.Images("run", "masks/encoder")[0].width == 6


def test_a_full_disk_is_told_once_and_closing_does_not_hide_it(tmp_path, monkeypatch, capfd):
    board = TensorBoard(tmp_path, 0, 1)
    records = board.writer.file_writer.event_writer._async_writer._writer

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "write", refuse)
    with pytest.raises(OSError, match="No space left"):
        for step in range(1, 10):
            board.after_step(report(step))
            time.sleep(0.01)
    monkeypatch.setattr(records, "flush", refuse)
    board.close()
    assert "Traceback" not in capfd.readouterr().err and threading.excepthook is threading.__excepthook__


def test_samples_are_files_and_text_per_mode_made_in_eval_mode(tmp_path):
    board, fake = TensorBoard(tmp_path / "tb", 0, 1), Fake()
    hook = TextSamples(fake, Batch(5), lambda ids: f"<{ids}>", 2, tmp_path / "samples", board, limit=2)
    hook.after_step(report(1))
    hook.after_step(report(2))
    board.close()
    files = list((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["step_000002.txt"]
    block = "source     <[1, 2]>\ntarget     <[1, 3, 6]>\nar         <[1, 4, 6]>\nnar        <[1, 5, 6]>\n"
    assert files[0].read_text() == f"{block}\n{block}"
    assert fake.modes == [False] and fake.module.training
    found = read(tmp_path / "tb")
    shown = {
        mode: found.Tensors(f"samples/{mode}/text_summary")[0].tensor_proto.string_val[0] for mode in ("ar", "nar")
    }
    head, _, *rows = shown["nar"].decode().splitlines()
    assert head == "| source | target, **bold** where it was hidden | nar, **bold** where wrong |"
    before, hidden, wrong, after = (plain(f"<[{ids}]>") for ids in (1, 3, 5, 6))
    assert rows == [f"| {plain('<[1, 2]>')} | {before}**{hidden}**{after} | {before}**{wrong}**{after} |"] * 2
    assert shown["ar"].decode().startswith("| source | target | ar, **bold** where wrong |")
    silent = TextSamples(fake, Batch(5), str, 1, tmp_path / "none", None)
    silent.after_step(SimpleNamespace(due=lambda every: True, step=3))
    assert not (tmp_path / "none").exists() and len(fake.modes) == 2, "every rank predicts, one writes"


def test_restarts_and_skips_are_drawn_once(tmp_path):
    first = TensorBoard(tmp_path, first_step=0, every=1)
    first.began(0, 0)
    for step in range(1, 6):
        first.after_step(report(step))
        first.skipped(step, 2 if step >= 4 else 0)
    first.back_to(2)
    first.skipped(3, 3)
    first.close()
    time.sleep(1.1)
    second = TensorBoard(tmp_path, first_step=3, every=1)
    second.began(1, 3)
    second.skipped(4, 3)
    second.close()
    board = read(tmp_path)
    assert [(e.step, e.value) for e in board.Scalars("events/skipped")] == [(3, 3.0)]
    assert [(e.step, e.value) for e in board.Scalars("events/restarts")] == [(4, 1.0)]
    assert [e.step for e in board.Scalars("loss/total")] == [1, 2]


def test_a_validation_is_given_up_for_a_signal_and_told_to_be_done_again(tmp_path):
    evaluated, saved = [], []

    class Signalled(Fake):
        def evaluate(self, batches):
            evaluated.extend(batches)
            if len(evaluated) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().evaluate(batches)

    save = Save(1, lambda progress: saved.append(progress.step))
    each = [Validation(Signalled(), [Batch(1)] * 5, 2, None, None), save, StopOnSignal(save)]
    hooks = AllRanks(each, tmp_path, SimpleNamespace(writing=False, commit=lambda: None))
    with Signals():
        hooks.after_step(report(1))
        assert hooks.unfinished is None and saved == [1]
        with pytest.raises(Requeue) as stop:
            hooks.after_step(report(2))
    assert stop.value.shared and len(evaluated) == 2 and saved == [1]
    assert hooks.unfinished == report(2)
    again = StepReport.from_json(hooks.unfinished.to_json())
    assert again == report(2) and again.due(2)
    for damaged in ('{"progress": {"step": 1}}', "{}", "[1", 7, again.to_json().replace("losses", "gains")):
        with pytest.raises(CheckpointError, match="of a checkpoint"):
            StepReport.from_json(damaged)


def test_a_wait_is_given_up_for_a_signal():
    with Signals() as signals:
        with pytest.raises(Requeue), signals.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        with pytest.raises(Requeue), signals.interruptible():
            pytest.fail("the signal came before")
    with Signals() as signals:
        with signals.interruptible():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert signals.received

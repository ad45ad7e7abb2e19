"""`status`: what it says of a run in every state it can be found in, and the arithmetic of goodput and time left."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from finetune.__main__ import main as finetune
from pretrain.__main__ import main
from pretrain.checkpoints.checkpoint import read_progress
from pretrain.errors import CheckpointError
from pretrain.report.status import PACE, SPEED, Board, Status, describe, kept_saves, read_status
from pretrain.runs import read_events
from pretrain.watch.tensorboard import TensorBoard
from tests.pretrain.runs import WORDS, make_data, scalars, start, wait_for_save, write_config
from tests.pretrain.test_hooks import report

NEWEST = "step-00000004"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the finished run `tiny` of four updates with checkpoints at 2 and 4."""
    place = tmp_path_factory.mktemp("whole")
    config = write_config(place, make_data(place, 60))
    assert main(["train", str(config), "train.steps=4", "train.save_every=2"]) == 0
    return place


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole / "runs" / "tiny", tmp_path / "tiny")
    return tmp_path / "tiny"


def read(run: Path) -> Status:
    return read_status(run, time.time())


def write_events(run: Path, *lines: dict[str, Any]) -> None:
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def event(name: str, step: int, at: float, **details: Any) -> dict[str, Any]:
    return {"time": at, "event": name, "step": step, **details}


def damage(commit: Path) -> None:
    state = commit / "state-rank0.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)


def test_a_finished_run(run: Path) -> None:
    found = read(run)
    assert (found.state, found.by, found.step, found.steps) == ("finished", None, 4, 4)
    assert (found.verified_step, found.latest, found.problem, found.checkpoints) == (4, NEWEST, None, 2)
    assert found.tokens == read_progress(run / "checkpoints" / NEWEST)["progress"]["tokens"] > 0
    assert found.checkpoint_bytes == sum(path.stat().st_size for path in run.glob("checkpoints/*/*"))
    assert (found.restarts, found.errors, found.skipped_updates, found.last_error) == (0, 0, 0, None)
    assert found.seconds_left == 0 and 0 < (found.goodput or 0) < 1
    shown = describe(found)
    assert "state    finished\n" in shown and "step     4 of 4 (100.0%)" in shown and "left     nothing\n" in shown
    assert f"step 4, verified, latest names it, {found.tokens:,} tokens seen" in shown
    assert "lives    0 restarts, 0 errors, 0 skipped updates" in shown and "2 checkpoints, " in shown
    curve = scalars(run)
    for tag in ("loss/total", "loss/ar", "valid/nar"):
        assert found.losses[tag] == pytest.approx(curve[tag][-1][1])
    assert f"loss     total {found.losses['loss/total']:.3g}, ar {found.losses['loss/ar']:.3g}, " in shown
    assert f"valid    total {found.losses['valid/total']:.3g}, " in shown


def test_json_is_for_programs_and_has_every_field(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["status", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [field.name for field in fields(Status)]
    assert found["state"] == "finished" and found["verified_step"] == 4 and found["problem"] is None


def test_a_running_run_that_is_then_killed(whole: Path, tmp_path: Path) -> None:
    job = start("train", write_config(tmp_path, whole / "data"), "train.steps=100000", "train.save_every=1",
                "train.keep=1", "train.sample_every=0", "train.validate_every=0")  # fmt: skip
    run = tmp_path / "runs" / "tiny"
    try:
        wait_for_save(job, run)
        verified = 0
        for _ in range(10):  # retention deletes what is being read
            found = read(run)
            assert found.state == "running" and f"pid {job.pid}" in str(found.by) and found.problem is None
            assert found.verified_step is not None and found.verified_step >= verified
            verified = found.verified_step
        assert found.seconds_since_sign < 5 and found.seconds_left and "until" in describe(found)
    finally:
        job.kill()
        job.communicate()
    dead = read(run)
    assert (dead.state, dead.by) == ("killed", None) and dead.verified_step is not None
    assert dead.verified_step >= verified and "once it is started again" in describe(dead)
    later = read_status(run, time.time() + 1e6)
    assert later.goodput == dead.goodput and later.seconds_since_start == dead.seconds_since_start, "the clock stopped"
    assert later.seconds_since_sign > 1e6


def test_a_run_that_a_signal_stopped(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"

    def stop() -> None:
        while not any(run.glob("checkpoints/step-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    config = write_config(tmp_path, whole / "data")
    assert main(["train", str(config), "train.steps=100000", "train.save_every=5", "train.validate_every=0"]) == 85
    found, last = read(run), read_events(run)[-1]
    assert (found.state, found.by, last["event"]) == ("stopped by a signal", None, "stop")
    assert found.verified_step == found.step == last["step"], "the signal saved the very last update"


def test_a_run_that_failed(whole: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, whole / "data")
    assert main(["train", str(config), "optim.lr=1e38", "optim.warmup=0", "train.steps=50"]) == 7
    found = read(tmp_path / "runs" / "tiny")
    assert (found.state, found.errors, found.verified_step, found.seconds_since_save) == ("failed", 1, None, None)
    assert str(found.last_error).startswith("NonFiniteError: ")
    shown = describe(found)
    assert "saved    nothing yet\n" in shown and "1 error," in shown and str(found.last_error) in shown
    assert main(["train", str(config), "train.steps=2"]) == 0
    assert read(tmp_path / "runs" / "tiny").state == "finished", "what comes later counts"


def test_a_damaged_newest_checkpoint_is_not_where_the_next_start_resumes(run: Path) -> None:
    damage(run / "checkpoints" / NEWEST)
    found = read(run)
    assert (found.verified_step, found.latest, found.problem) == (2, NEWEST, None)
    assert f"step 2, verified, latest names {NEWEST}" in describe(found)
    damage(run / "checkpoints" / "step-00000002")
    lost = read(run)
    assert (lost.verified_step, lost.tokens) == (None, None)
    assert "has 2 checkpoints and none is intact" in str(lost.problem) and str(lost.problem) in describe(lost)


def test_a_run_that_never_began(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: str) -> str:
        capsys.readouterr()
        assert main(["status", path]) == 5
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("years")
    for nothing in ("nowhere", "empty", "file"):
        assert "must be the folder of a run, it has no config.yaml" in refused(str(tmp_path / nothing))
    (run / "events.jsonl").write_text('{"event": "sta')
    assert "has not begun" in refused(str(run))
    (run / "events.jsonl").unlink()
    assert "it has no events.jsonl" in refused(str(run))
    (run / "config.yaml").write_text("train: {steps: many}")
    monkeypatch.chdir(run)
    assert "`config.yaml` is damaged" in refused(".")


def test_a_run_that_tunes(whole: Path, tmp_path: Path) -> None:
    assert main(["handoff", str(whole / "runs" / "tiny"), "--out", str(tmp_path / "bundle")]) == 0
    (tmp_path / "pairs.tsv").write_text("".join(f"{one} {other}\t{other}\n" for one in WORDS for other in WORDS))
    config = tmp_path / "tune.yaml"
    pairs = str(tmp_path / "pairs.tsv")
    values = {
        "name": "tuned", "runs": str(tmp_path), "bundle": str(tmp_path / "bundle"),
        "task": {"name": "pairs", "train": pairs, "valid": pairs}, "runner": {"name": "ar"},
        "max_source": 16, "max_target": 16, "shown": 1, "batch": {"samples": 8}, "train": {"steps": 3, "save_every": 2},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(values))
    assert finetune(["train", str(config), "train.log_every=1"]) == 0
    found = read(tmp_path / "tuned")
    assert (found.state, found.step, found.steps, found.verified_step) == ("finished", 3, 3, 3)
    assert found.goodput and found.seconds_per_update


def test_goodput_counts_updates_whose_result_was_kept(run: Path) -> None:
    write_events(
        run,
        event("start", 0, 1000.0),
        event("save", 2, 1050.0, seconds=40.0, save_seconds=2.0),
        event("save", 4, 1100.0, seconds=45.0, save_seconds="many"),
        event("pause", 4, 1110.0, message="paused: the disk is full"),
        event("resume", 2, 1200.0),  # what was saved at 4 is damaged
        event("skip", 3, 1210.0),
        event("pause", 2, 1250.0, message="paused: the disk is full"),
        event("save", 4, 1260.0, seconds=30.0, save_seconds=11.5, paused_seconds=10.0),
        event("stop", 4, 1400.0),
    )
    shutil.rmtree(run / "tb")
    found = read_status(run, 5000.0)
    assert (found.state, found.step, found.restarts, found.skipped_updates) == ("stopped by a signal", 4, 1, 1)
    assert found.seconds_since_start == 400 and found.goodput == pytest.approx((40 + 30) / 400)
    assert found.seconds_since_save == 5000 - 1260 and found.seconds_since_sign == 3600
    assert (found.seconds_per_update, found.tokens_per_second, found.seconds_left) == (None, None, None)
    assert (found.seconds_saving, found.seconds_paused, found.seconds_between) == (2.0 + 1.5, 10.0, 90.0)
    assert "pace     not known yet\n  left     not known yet\n  goodput  18% of 6:40 " in describe(found)
    assert "1:10 of updates, 0:04 saving, 0:10 paused, 1:30 between lives\n" in describe(found)


def test_a_save_that_tells_no_seconds_has_those_since_the_event_before() -> None:
    events = [
        event("start", 0, 100.0),
        event("save", 1, 130.0),
        event("error", 1, 140.0, kind="DiskError", message="full"),
        event("resume", 1, 150.0),
        event("save", 2, 170.0, seconds="many"),
        event("save", 3, 172.0, seconds=-1.0),
    ]
    assert [(save["step"], save["seconds"]) for save in kept_saves(events)] == [(1, 30.0), (2, 20.0), (3, 0.0)]
    assert [save["step"] for save in kept_saves([*events, event("start", 0, 200.0)])] == [], "it began anew"


def write_board(folder: Path, began: int, pace: float) -> Path:
    """A life of three updates on the board, as written by a job that began at second `began`."""
    board = SummaryWriter(str(folder / "new"))
    for step in (1, 2, 3):
        board.add_scalar(PACE, 10.0, step, walltime=began + pace * step)
        board.add_scalar(SPEED, 100.0 * step, step, walltime=began + pace * step)
    board.close()
    (written,) = (folder / "new").iterdir()
    return written.rename(folder / f"events.out.tfevents.{began}.host.1.0")


def test_time_left_is_that_of_the_last_updates_of_this_life(run: Path) -> None:
    shutil.rmtree(run / "tb")
    second = write_board(run / "tb", 1_700_060_000, 3.0)
    write_board(run / "tb", 1_700_050_000, 100.0)  # an older life, copied later
    write_events(run, event("start", 0, 1_700_049_999.0), event("resume", 0, 1_700_059_999.0))
    found = read_status(run, 1_700_060_020.0)
    assert (found.step, found.seconds_per_update, found.tokens_per_second) == (3, 3.0, 300.0)
    assert found.seconds_left == 3.0 * (4 - 3) and found.state == "killed"
    assert found.seconds_since_sign == 20 - 9 and found.seconds_since_start == 10_010
    with second.open("r+b") as file:
        file.truncate(second.stat().st_size - 7)  # as a kill leaves it
    cut = Board.read(run / "tb")
    assert cut is not None and (cut.step, cut.seconds_per_update, cut.tokens_per_second) == (3, 3.0, 200.0)


def test_the_newest_life_is_the_last_that_began_though_the_clock_was_set_back(run: Path) -> None:
    shutil.rmtree(run / "tb")
    write_board(run / "tb", 1_700_060_000, 3.0)
    write_board(run / "tb", 1_700_050_000, 5.0)
    write_events(run, event("start", 0, 1_700_059_999.0), event("resume", 0, 1_700_049_998.0))
    found = read_status(run, 1_700_050_005.0)
    assert (found.seconds_per_update, found.step) == (5.0, 3) and found.seconds_since_start == 0
    assert found.goodput is None and found.seconds_since_sign == 0
    shown = describe(found)
    assert "last sign of life 0:00 ago" in shown and "5 s an update" in shown


def test_a_clock_that_was_set_back_within_a_life_tells_no_pace(run: Path) -> None:
    shutil.rmtree(run / "tb")
    write_board(run / "tb", 1_700_060_000, -3.0)
    found = read(run)
    assert (found.seconds_per_update, found.seconds_left) == (None, None)
    assert "pace     not known yet" in describe(found)


def test_boards_of_one_second_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, pace in ((9, 1.0), (10, 2.0)):
        write_board(tmp_path, 1_700_060_000, pace).rename(tmp_path / f"events.out.tfevents.1700060000.host.1.{number}")
    for began in (None, 1_700_059_999.5):
        found = Board.read(tmp_path, began)
        assert found is not None and found.seconds_per_update == 2.0


def test_without_locks_nobody_knows_whether_it_is_running(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("pretrain.checkpoints.holder.fcntl.fcntl", refuse)
    assert read(run).state == "finished", "it says so itself"
    write_events(run, event("start", 0, time.time()))
    found = read(run)
    assert (found.state, found.by) == ("not known, this file system has no locks", None)
    assert "state    not known, this file system has no locks\n" in describe(found)
    capsys.readouterr()
    assert main(["verify", str(run)]) == 0
    assert "note perhaps in use: this file system has no locks" in capsys.readouterr().out


def test_a_life_without_an_update_has_no_pace(tmp_path: Path) -> None:
    assert Board.read(tmp_path / "none") is None
    board = TensorBoard(tmp_path, 0, 1)
    board.close()
    assert Board.read(tmp_path) is None
    board = TensorBoard(tmp_path, 7, 1)
    board.after_step(report(8))
    board.close()
    found = Board.read(tmp_path)
    assert found is not None and (found.step, found.seconds_per_update) == (8, None)


def test_a_checkpoint_that_retention_deletes_is_not_a_problem(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.report import status as module

    def late(path: Path) -> dict[str, Any]:
        if path.name == NEWEST:
            shutil.rmtree(path)
            raise CheckpointError("it is gone")
        return read_progress(path)

    monkeypatch.setattr(module, "read_progress", late)
    found = read(run)
    assert (found.verified_step, found.problem) == (2, None)

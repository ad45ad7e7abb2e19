"""The queue: order, stamps, what is run again, what a failure and the end of the time leave."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.reproduce.step import PYTHON, Queue, Step
from pretrain.errors import EXIT_REQUEUE


def step(name: str, code: str, *needs: Step, **rest: object) -> Step:
    return Step(name, (PYTHON, "-c", code), needs, **rest)  # type: ignore[arg-type]


def noted(name: str, folder: Path, *needs: Step, **rest: object) -> Step:
    """A step that writes its name behind the others'."""
    return step(name, f"open({str(folder / 'order')!r}, 'a').write({name + ' '!r})", *needs, **rest)


def queue(folder: Path, jobs: int = 1, seconds: float = 60) -> Queue:
    return Queue(folder, jobs, threads=4, deadline=time.monotonic() + seconds)


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split()


def test_what_is_needed_comes_first_and_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    first = noted("a/first", tmp_path)
    second = noted("second", tmp_path, first)
    other = noted("other", tmp_path)
    assert queue(tmp_path).run([second, other, first]) == []
    assert order(tmp_path) == ["other", "a/first", "second"]
    stamp = json.loads((tmp_path / "steps" / "a" / "first.json").read_text())
    assert stamp["command"] == first.line and stamp["command"].startswith("python -c ")
    assert queue(tmp_path).run([second, other, first]) == []
    assert len(order(tmp_path)) == 3


def test_what_a_change_concerns_is_run_again(tmp_path: Path) -> None:
    first, other = noted("first", tmp_path), noted("other", tmp_path)
    queue(tmp_path).run([first, other, noted("second", tmp_path, first)])
    changed = step("first", "pass")
    assert queue(tmp_path).run([changed, other, noted("second", tmp_path, changed)]) == []
    assert order(tmp_path) == ["first", "other", "second", "second"]


def test_an_output_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "out" / "told.txt"
    broken = step("told", "print('half', flush=True); raise SystemExit(4)", output=output)
    failing = queue(tmp_path)
    assert failing.run([broken]) == [broken] and failing.failed == {"told": 4} and not output.exists()
    whole = step("told", "print('whole')", output=output)
    assert queue(tmp_path).run([whole]) == [] and output.read_text() == "whole\n"
    output.unlink()
    assert queue(tmp_path).run([whole]) == [] and output.exists()
    made = step("made", "pass", makes=tmp_path / "nowhere")
    assert not queue(tmp_path).done(made)


def test_a_failure_keeps_back_what_needs_it_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = step("broken", "import sys; print('why', file=sys.stderr); sys.exit(3)")
    behind = noted("behind", tmp_path, broken)
    work = queue(tmp_path, jobs=2)
    assert work.run([broken, behind, noted("other", tmp_path)]) == [broken, behind]
    assert order(tmp_path) == ["other"] and work.failed == {"broken": 3}
    assert (tmp_path / "logs" / "broken.log").read_text() == "why\n"
    assert "FAILED broken with exit code 3" in capsys.readouterr().err


def test_the_end_of_the_time_lets_a_step_save(tmp_path: Path) -> None:
    saving = (
        "import signal, sys, time, pathlib\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({EXIT_REQUEUE}))\n"
        f"saved = pathlib.Path({str(tmp_path / 'saved')!r})\n"
        "if saved.exists(): sys.exit(0)\n"
        "saved.write_text('x'); time.sleep(60)"
    )
    slow = step("slow", saving)
    work = queue(tmp_path, seconds=3)
    started = time.monotonic()
    assert work.run([slow, noted("behind", tmp_path, slow)])[0] is slow
    assert time.monotonic() - started < 30 and not work.failed and not work.stopped
    assert queue(tmp_path).run([slow]) == []


def test_a_signal_ends_it_like_the_end_of_the_time(tmp_path: Path) -> None:
    slow = step("slow", "import time; time.sleep(60)")
    work = queue(tmp_path)
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    assert work.run([slow]) == [slow] and work.stopped
    timer.join()


def test_a_step_does_not_outlive_a_queue_that_is_killed(tmp_path: Path) -> None:
    """What is killed cannot tell its steps to save: the kernel does, so that the next life finds nothing locked."""
    saving = (
        "import os, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / 'told')!r}, 'w').close(), sys.exit(85)))\n"
        f"open({str(tmp_path / 'begun')!r}, 'w').close(); time.sleep(60)"
    )
    if not (child := os.fork()):
        queue(tmp_path).run([step("slow", saving)])
        os._exit(0)
    _until((tmp_path / "begun").exists)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _until((tmp_path / "told").exists)


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_steps_share_the_threads_unless_they_are_alone(tmp_path: Path) -> None:
    told = "import os; print(os.environ['OMP_NUM_THREADS'])"
    one, two = (step(name, told, output=tmp_path / name) for name in ("one", "two"))
    alone = step("alone", told, output=tmp_path / "whole", alone=True)
    assert queue(tmp_path, jobs=2).run([one, alone, two]) == []
    assert [(tmp_path / name).read_text() for name in ("one", "two", "whole")] == ["2\n", "2\n", "4\n"]


def test_nothing_runs_beside_a_step_that_is_alone(tmp_path: Path) -> None:
    timed = "import time; begin = time.time(); time.sleep(0.5); print(begin, time.time())"
    steps = [step(name, timed, output=tmp_path / name, alone=name == "alone") for name in ("a", "alone", "b", "c")]
    assert queue(tmp_path, jobs=3).run(steps) == []
    spans = {name: [float(word) for word in (tmp_path / name).read_text().split()] for name in ("a", "alone", "b", "c")}
    begin, end = spans.pop("alone")
    assert all(other_end <= begin or other_begin >= end for other_begin, other_end in spans.values())


def test_a_stamp_of_rubbish_is_none(tmp_path: Path) -> None:
    only = noted("only", tmp_path)
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "only.json").write_text('{"key": "another"}')
    assert queue(tmp_path).run([only]) == [] and order(tmp_path) == ["only"]
    assert sys.executable not in only.line

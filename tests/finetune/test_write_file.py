"""`generate` from file to file: killed and continued to the same bytes, refused for another command, in bounds."""

import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from finetune import write_file
from finetune.__main__ import main
from finetune.partial import Partial
from finetune.progress import LineProgress
from finetune.tasks.pairs import read_lines
from finetune.write_file import lines_of
from pretrain.errors import DataError, UsageError
from tests.finetune.test_end_to_end import PAIRS, bundle_at

LINES = 200  # four windows with --batch-tokens 128
BASE = ("--max-length", "8", "--batch-tokens", "128", "--device", "cpu")
WAYS = {
    "beam": ("--mode", "ar", "--beam", "2", "--n-best", "2", "--scores", *BASE),
    "sample": ("--mode", "ar", "--sample", "--top-k", "20", "--n-best", "2", *BASE),
    "nar": ("--mode", "nar", "--iterations", "1", "--dedup", *BASE),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("write")
    bundle_at(folder / "janus", ("ar", "nar"), "bos_first", init_std=0.3)
    bundle_at(folder / "other", ("ar", "nar"), "bos_first", seed=1, init_std=0.3)
    draw = random.Random(3)
    sources = [" ".join(draw.choices([source for source, _ in PAIRS], k=draw.randint(1, 3))) for _ in range(LINES)]
    (folder / "in").write_text("".join(f"{source}\n" for source in sources), encoding="utf-8")
    for way in WAYS:
        assert main(command(folder, way, folder / f"calm-{way}")) == 0
        assert len(set((folder / f"calm-{way}").read_bytes().splitlines())) > 20, "lines that could be told apart"
    return folder


def command(place: Path, way: str, out: Path, source: str = "in", bundle: str = "janus") -> list[str]:
    return ["generate", str(place / bundle), *WAYS[way], "--input", str(place / source), "--output", str(out)]


def record_of(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.partial.json").read_text(encoding="utf-8"))


class Died(BaseException):
    """Stands for kill -9 in tests that run in one process: nobody catches it."""


def dies_in_window(monkeypatch: pytest.MonkeyPatch, number: int, what: Callable[[], None] | None = None) -> None:
    """Ends the process inside window `number`, counted from 0, half a piece already written behind the record."""
    append, windows = Partial.append, []

    def counted(self: Partial, text: bytes, lines: int) -> None:
        windows.append(lines)
        if len(windows) > number:
            os.write(self.file.fileno(), text[: len(text) // 2])
            raise Died
        append(self, text, lines)

    monkeypatch.setattr(Partial, "append", counted)


# --------------------------------------------------------------------------------------------------- killed, continued


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [1, 3])
def test_what_was_cut_short_goes_on_to_the_same_bytes(
    place: Path, way: str, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Died):
        dies_in_window(patch, window)
        main(command(place, way, out))
    assert not out.exists() and record_of(out)["lines"] == 64 * window
    assert out.with_name("out.partial").stat().st_size > record_of(out)["bytes"]
    capsys.readouterr()
    assert main(command(place, way, out)) == 0
    told = capsys.readouterr().err
    assert f"{64 * window:,} of 200 lines are there" in told
    assert f"{LINES - 64 * window} sentences in" in told, "only the rest was written"
    assert out.read_bytes() == (place / f"calm-{way}").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kills", "lines"), [(2, LINES), pytest.param(20, 4000, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills: int, lines: int, place: Path, tmp_path: Path) -> None:
    """Real processes and kill -9, a moment after something was kept, until the last one comes to its end."""
    out, draw, kept = tmp_path / "out", random.Random(), [0]
    repeated = (place / "in").read_text(encoding="utf-8") * (lines // LINES)
    (place / "many").write_text(repeated, encoding="utf-8")
    assert main(command(place, "beam", place / "calm-many", "many")) == 0
    words, record = command(place, "beam", out, "many"), out.with_name("out.partial.json")
    for life in range(kills + 1):
        # Forked, because a new interpreter would take longer to import torch than to write.
        process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(words)))
        process.start()
        while life < kills and process.is_alive() and (not record.exists() or record_of(out)["lines"] == kept[-1]):
            time.sleep(0.001)
        if life < kills:
            time.sleep(draw.uniform(0.0, 0.05))
            process.kill()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL)
        if out.exists():
            break
        kept.append(record_of(out)["lines"])
    assert kept[1] > 0 and all(one < two for one, two in pairwise(kept)), kept
    assert out.read_bytes() == (place / "calm-many").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.fault("signals in each phase")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_with_the_code_for_requeueing(
    place: Path, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, append = tmp_path / "out", Partial.append

    def signalled(self: Partial, text: bytes, lines: int) -> None:
        append(self, text, lines)
        if self.lines == 128:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Partial, "append", signalled)
        assert main(command(place, "nar", out)) == 85
    assert signal.getsignal(number) is before
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: stopped by a signal, 128 lines are in `{out}.partial`: run the same command to go on"
    assert not out.exists() and record_of(out)["lines"] == 128
    assert main(command(place, "nar", out)) == 0
    assert out.read_bytes() == (place / "calm-nar").read_bytes()


def test_killed_between_the_last_piece_and_the_end(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"

    def die(self: Partial) -> None:
        raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(Partial, "finish", die)
        main(command(place, "nar", out))
    capsys.readouterr()
    assert main(command(place, "nar", out)) == 0
    assert "nothing was left to write" in capsys.readouterr().err
    assert out.read_bytes() == (place / "calm-nar").read_bytes()


def test_killed_between_the_name_and_the_record(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a file that is finished is not taken for that of a new part."""
    out = tmp_path / "out"

    def die(self: Partial) -> None:
        self.path.replace(self.target)
        raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(Partial, "finish", die)
        main(command(place, "nar", out))
    assert out.exists() and record_of(out)["lines"] == LINES
    assert main(command(place, "beam", out)) == 0
    assert out.read_bytes() == (place / "calm-beam").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.fixture(scope="module")
def died(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a command of way `beam` that died after two windows."""
    folder = tmp_path_factory.mktemp("died")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        dies_in_window(patch, 2)
        main(command(place, "beam", folder / "out"))
    return folder


@pytest.fixture
def part(died: Path, tmp_path: Path) -> Path:
    """OUT of such a command."""
    shutil.copytree(died, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "bundle", "source", "names"),
    [
        (["--beam", "3"], "janus", "in", ["`beam` 2, not 3"]),
        (
            ["--no-repeat-ngram", "3", "--n-best", "1"],
            "janus",
            "in",
            ["`n_best` 2, not 1", "`no_repeat_ngram` 0, not 3"],
        ),
        (["--batch-tokens", "64"], "janus", "in", ["`batch_tokens` 128, not 64"]),
        (["--dedup"], "janus", "in", ["`dedup` False, not True"]),
        ([], "janus", "changed", ["another `--input`"]),
        ([], "other", "in", ["another bundle"]),
    ],
)
def test_a_part_of_something_else_is_named_and_kept(
    place: Path, part: Path, changes: list[str], bundle: str, source: str, names: list[str],
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    (place / "changed").write_text((place / "in").read_text(encoding="utf-8") + "mu\n", encoding="utf-8")
    before = record_of(part)
    capsys.readouterr()
    assert main([*command(place, "beam", part, source, bundle), *changes]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "`--restart` to begin anew" in error
    assert f"holds 128 lines that were written with {' and '.join(names)}:" in error
    assert record_of(part) == before and not part.exists()
    assert main([*command(place, "beam", part, source, bundle), *changes, "--restart"]) == 0
    each = 1 if "--n-best" in changes else 2
    assert len(part.read_text(encoding="utf-8").splitlines()) == each * (LINES + (source == "changed"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda part, record: os.truncate(part, 10), "must have at least"),
        (lambda part, record: record.write_text("{"), "cannot be read"),
        (lambda part, record: record.write_text('{"lines": "1"}'), "must have `identity`, `lines` and `bytes`"),
    ],
)
def test_a_damaged_part(
    place: Path, part: Path, damage: Callable[[Path, Path], None], message: str, capsys: pytest.CaptureFixture
) -> None:
    damage(part.with_name("out.partial"), part.with_name("out.partial.json"))
    capsys.readouterr()
    assert main(command(place, "beam", part)) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and "`--restart` begins anew" in error
    assert main([*command(place, "beam", part), "--restart"]) == 0
    assert part.read_bytes() == (place / "calm-beam").read_bytes()


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with Partial(tmp_path / "out", {"a": 1}) as first:
        first.append(b"x\n", 1)
        with pytest.raises(UsageError, match=r"out\.partial` is being written by another process"):
            Partial(tmp_path / "out", {"a": 1})
        first.finish()
    with Partial(tmp_path / "out", {"a": 2}) as again:
        assert again.lines == 0
        again.append(b"y\n", 1)
        again.finish()
    assert (tmp_path / "out").read_bytes() == b"y\n"


def test_places_that_are_no_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "out.partial")
    for name in ("", "pipe", "out"):
        assert main(command(place, "nar", tmp_path / name)) == 2
        assert "must be a" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "pipe"]


def test_nothing_is_left_where_nothing_was_written(place: Path, tmp_path: Path) -> None:
    assert main([*command(place, "nar", tmp_path / "out"), "--max-length", "65"]) == 3
    (place / "latin").write_bytes(b"fine\n\xff\n")
    assert main(command(place, "nar", tmp_path / "out", "latin")) == 4
    (place / "empty").write_bytes(b"")
    assert main(command(place, "nar", tmp_path / "out", "empty")) == 4
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ input, output


def test_stdin_and_stdout_write_the_same_and_leave_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calm = (place / "calm-sample").read_bytes()
    from_stdin = [word if word != str(place / "in") else "-" for word in command(place, "sample", tmp_path / "out")]

    def piped(*words: str) -> int:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((place / "in").read_bytes())))
        return main([*from_stdin, *words])

    capsys.readouterr()
    assert piped("--output", "-") == 0
    assert capsys.readouterr().out.encode() == calm
    with monkeypatch.context() as patch, pytest.raises(Died):
        dies_in_window(patch, 2)
        piped()
    assert not list(tmp_path.iterdir()), "what cannot be read again is not kept"
    assert piped() == 0
    assert (tmp_path / "out").read_bytes() == calm


def test_stdin_does_not_overwrite_what_is_kept(
    place: Path, part: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"alpha\n")))
    words = [word if word != str(place / "in") else "-" for word in command(place, "beam", part)]
    assert main(words) == 2 and record_of(part)["lines"] == 128
    assert "another `--input`" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("content", ["", "\n", "a", "a\n", "a\r\nb\r\n", "a\n\n b \n", "\u2028a\x0cb\n\u00e9\n", "\r"])
def test_lines_are_those_of_read_lines(content: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"in{ending}"
    path.write_bytes(gzip.compress(content.encode()) if ending else content.encode())
    assert [line.strip("\r") for line in lines_of(str(path))] == [line.strip("\r") for line in read_lines(path)]


def test_a_cut_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.gz"
    path.write_bytes(gzip.compress(b"one\n" * 10000)[:-20])
    with pytest.raises(DataError, match=r"in\.gz` must be a UTF-8 text file"):
        list(lines_of(str(path)))


def test_scores_stand_beside_the_number_of_their_source(place: Path) -> None:
    lines = [line.split("\t") for line in (place / "calm-beam").read_text(encoding="utf-8").splitlines()]
    assert [int(number) for number, _, _ in lines] == [1 + index // 2 for index in range(2 * LINES)]
    best, second = ([float(score) for _, score, _ in lines[part::2]] for part in (0, 1))
    assert all(one >= two for one, two in zip(best, second, strict=True)) and max(best) < 0


def test_memory_is_bounded_by_the_window(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more lines are read ahead of those written than a window has."""
    read, ahead, append = [0], [], Partial.append

    def counted(source: str, see: Callable[[bytes], object] = len):
        for line in lines_of(source, see):
            read[0] += see is len
            yield line

    def kept(self: Partial, text: bytes, lines: int) -> None:
        ahead.append(read[0] - self.lines)
        append(self, text, lines)

    monkeypatch.setattr(write_file, "lines_of", counted)
    monkeypatch.setattr(Partial, "append", kept)
    assert main(command(place, "nar", tmp_path / "out")) == 0
    assert ahead == [64, 64, 64, 8]


def test_progress_tells_the_speed_of_this_life_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with LineProgress("generate", 10_000, 4_000) as progress:
        for _ in range(4):
            now[0] += 6.0
            progress.add(300)
    assert capsys.readouterr().err.splitlines() == [
        "generate: 4,600 of 10,000 lines, 50.0 lines/s, eta 1:48",
        "generate: 5,200 of 10,000 lines, 50.0 lines/s, eta 1:36",
    ]

"""`status RUN`: is it running, how far is it, when will it be done, and how much of its time was put to use.

Everything is read from the folder of the run, so it works beside a running job, from another host, and for a run that
died: events.jsonl tells of lives and saves, the board (its newest event file) of the updates since, the kernel of the
lock. Goodput is

    seconds of updates whose result is in a checkpoint that the run went on from / seconds since the first start

Updates that a kill threw away, validation, saving, starting and waiting in a queue are in the denominator alone. For a
run that is not running the clock stops at its last sign of life. A save that tells no `seconds` counts with the time
since the save or start before it. Between lives is the time from the last event of one to the start of the next: what a
kill threw away, and the wait in the queue.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pretrain import config as configuration
from pretrain import runs
from pretrain.checkpoints.checkpoint import read_progress
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.holder import NoLocks, holder
from pretrain.config import TrainConfig
from pretrain.errors import CheckpointError, ConfigError
from pretrain.loop import Progress
from pretrain.parsing import read_yaml
from pretrain.report.findings import folder_bytes, shown_bytes
from pretrain.watch.console import clock, short

# How a life ended, by its last event; a life without one of these was killed.
ENDS = {"finish": "finished", "stop": "stopped by a signal", "error": "failed"}
UNKNOWN = "not known, this file system has no locks"
BEGINS = ("start", "resume")
PAUSED = "paused, the disk is full"
RECENT = 4000  # values of the board that the pace is measured on
RETRIES = 5  # of reading a checkpoint, while a fast run deletes old ones
STARTING = 2.0  # seconds within which two lives cannot be told by their names
PACE, SPEED = "loss/total", "speed/tokens_per_second"
LOSSES = ("loss/", "valid/")


@dataclass(frozen=True)
class Status:
    """What `--json` prints. Times are seconds; None where the run does not tell yet.

    state: running, `PAUSED`, finished, stopped by a signal, failed, killed or `UNKNOWN`. by: the job that holds the
    run. step: last logged update. verified_step: of the newest intact checkpoint, which is where the next start
    resumes. problem: why there is none. tokens: seen at that checkpoint. seconds_left: of training, at the pace of the
    last updates.
    seconds_kept: of the updates that goodput counts. seconds_saving: that training stood still for checkpoints.
    seconds_paused: for want of room on the disk. seconds_between: lives. losses: {"loss/ar": 5.4, "valid/ar": 5.6,
    ...}, the last on the board of this life.
    """

    run: str
    state: str
    by: str | None
    step: int | None
    steps: int
    verified_step: int | None
    problem: str | None
    latest: str | None
    tokens: int | None
    checkpoints: int
    checkpoint_bytes: int
    seconds_since_save: float | None
    seconds_since_sign: float
    seconds_per_update: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    seconds_since_start: float
    seconds_kept: float
    seconds_saving: float
    seconds_paused: float
    seconds_between: float
    losses: dict[str, float]
    goodput: float | None
    restarts: int
    skipped_updates: int
    errors: int
    last_error: str | None
    seconds_since_error: float | None


def status(run_dir: str | Path, as_json: bool = False) -> None:
    """Prints what `read_status` finds, for people or as JSON."""
    found = read_status(Path(run_dir), time.time())
    print(json.dumps(asdict(found), indent=1) if as_json else describe(found))


def read_status(run: Path, now: float) -> Status:
    """Reads the folder of a run, which may be in use.

    Raises:
        CheckpointError: it is no run, or one that never started.
    """
    steps, events = _steps(run), whole_events(run)
    try:
        by, otherwise = holder(run), "killed"
    except NoLocks:
        by, otherwise = None, UNKNOWN
    begins = [event for event in events if event["event"] in BEGINS]
    store, board = Store(run), Board.read(run / runs.BOARD, begins[-1]["time"] if begins else None)
    progress, problem = _verified(store)
    saves = kept_saves(events)
    all_saves = [event for event in events if event["event"] == "save"]
    errors = [event for event in events if event["event"] == "error"]
    error = _first_of_last(events)
    ended = next((event["event"] for event in reversed(events) if event["event"] in (*ENDS, *BEGINS)), "")
    sign = max(events[-1]["time"], board.time if board else 0.0)
    passed = max(0.0, (now if by else sign) - events[0]["time"])  # a clock may have been set back
    step = max([event["step"] for event in events[-1:]] + ([board.step] if board else []))
    kept = sum(save["seconds"] for save in saves)
    return Status(
        run=str(run),
        state=(PAUSED if events[-1]["event"] == "pause" else "running") if by else ENDS.get(ended, otherwise),
        by=by,
        step=step,
        steps=steps,
        verified_step=progress.step if progress else None,
        problem=problem,
        latest=store.pointer(),
        tokens=progress.tokens if progress else None,
        checkpoints=len(store.commits()),
        checkpoint_bytes=folder_bytes(store.folder),
        seconds_since_save=max(0.0, now - saves[-1]["time"]) if saves else None,
        seconds_since_sign=max(0.0, now - sign),
        seconds_per_update=board.seconds_per_update if board else None,
        tokens_per_second=board.tokens_per_second if board else None,
        seconds_left=board.seconds_per_update * max(0, steps - step) if board and board.seconds_per_update else None,
        seconds_since_start=passed,
        seconds_kept=kept,
        seconds_saving=sum(_seconds(save, "save_seconds") - _seconds(save, "paused_seconds") for save in all_saves),
        seconds_paused=_until_next(events, lambda event, after: event == "pause" and after not in BEGINS),
        seconds_between=_until_next(events, lambda event, after: after in BEGINS),
        losses=board.losses if board else {},
        goodput=min(1.0, kept / passed) if passed > 0 else None,
        restarts=len(begins) - 1,
        skipped_updates=sum(event["event"] == "skip" for event in events),
        errors=len(errors),
        last_error=f"{error.get('kind')}: {error.get('message')}" if error else None,
        seconds_since_error=max(0.0, now - error["time"]) if error else None,
    )


def kept_saves(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saves that the run still stands on, each with the `seconds` of updates since the one before it.

    A start or resume at step n throws away what was saved beyond n: those checkpoints were damaged or lost.
    """
    saves: list[dict[str, Any]] = []
    before = 0.0
    for event in events:
        if event["event"] in BEGINS:
            saves = [save for save in saves if save["step"] <= event["step"]]
        elif event["event"] == "save":
            told = event.get("seconds")
            seconds = told if isinstance(told, int | float) else event["time"] - before
            saves.append({**event, "seconds": max(0.0, seconds)})
        else:
            continue
        before = event["time"]
    return saves


def _seconds(save: Mapping[str, Any], name: str) -> float:
    told = save.get(name)
    return max(0.0, told) if isinstance(told, int | float) else 0.0


def _until_next(events: Sequence[dict[str, Any]], wanted: Callable[[str, str], bool]) -> float:
    """Seconds from each event to the one after it, of the pairs whose names are wanted."""
    pairs = [(event, after) for event, after in pairwise(events) if wanted(event["event"], after["event"])]
    return sum(max(0.0, after["time"] - event["time"]) for event, after in pairs)


@dataclass(frozen=True)
class Board:
    """The last updates on the board of the newest life. time: of its last entry."""

    step: int
    time: float
    seconds_per_update: float | None
    tokens_per_second: float | None
    losses: dict[str, float]

    @classmethod
    def read(cls, folder: Path, began: float | None = None) -> "Board | None":
        """Reads the event file of the life that `began` then, else the newest; None where no update is on it yet."""
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event

        # A pipe among them would be waited for.
        files = [path for path in folder.glob("events.out.tfevents.*") if path.is_file()]
        if not files:
            return None
        recent = deque(RawEventFileLoader(str(_of_life(files, began))).Load(), maxlen=RECENT)
        parsed = [(event, value) for event in map(Event.FromString, recent) for value in event.summary.value]
        paces = [(event.step, event.wall_time) for event, value in parsed if value.tag == PACE]
        speeds = [value.simple_value for _, value in parsed if value.tag == SPEED]
        if not paces:
            return None
        (first_step, first_time), (step, last_time) = paces[0], paces[-1]
        # A clock that was set back within a life tells no pace.
        went_on = step > first_step and last_time > first_time
        pace = (last_time - first_time) / (step - first_step) if went_on else None
        losses = {value.tag: value.simple_value for _, value in parsed if value.tag.startswith(LOSSES)}
        return cls(step, parsed[-1][0].wall_time, pace, speeds[-1] if speeds else None, losses)


def _of_life(files: Sequence[Path], began: float | None) -> Path:
    """The event file of the life that began then.

    Names tell when a life began, a copy has other times. The newest name is that of an older life where the clock was
    set back in between; events.jsonl is in the order in which things happened.
    """

    def numbers(path: Path) -> list[int]:  # events.out.tfevents.SECOND.HOST.PID.NUMBER
        return [int(part) for part in path.name.split(".") if part.isdecimal()] or [0]

    def distance(path: Path) -> float:
        return 0.0 if began is None else max(STARTING, abs(numbers(path)[0] - began))

    return min(sorted(files, key=numbers, reverse=True), key=distance)


def describe(found: Status) -> str:
    """The status for people, a line for each question they have."""

    pointed = "latest names it" if found.latest == _name(found.verified_step) else f"latest names {found.latest}"
    saved = found.problem or "nothing yet"
    if found.verified_step is not None:
        saved = f"step {found.verified_step:,}, verified, {pointed}, {found.tokens:,} tokens seen"
    if found.seconds_since_save is not None:
        saved += f"; last save {clock(found.seconds_since_save)} ago"
    share = f" ({found.step / found.steps:.1%})" if found.step is not None and found.steps else ""
    pace = "not known yet"
    if found.seconds_per_update is not None:
        pace = f"{found.seconds_per_update:.3g} s an update"
        pace += f", {short(found.tokens_per_second)} tokens/s" if found.tokens_per_second is not None else ""
    left = "not known yet"
    if found.seconds_left is not None:
        done = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + found.seconds_left))
        when = f"until {done}" if found.by else "once it is started again"
        if found.state == UNKNOWN:
            when = f"until {done} if it is running"
        left = f"{clock(found.seconds_left)}, {when}" if found.seconds_left else "nothing"
    of_time = f" of {clock(found.seconds_since_start)} since the first start, {clock(found.seconds_kept)} of updates"
    for what, seconds in (
        ("saving", found.seconds_saving),
        ("paused", found.seconds_paused),
        ("between lives", found.seconds_between),
    ):
        of_time += f", {clock(seconds)} {what}" if seconds >= 1 else ""
    sign = f"last sign of life {clock(found.seconds_since_sign)} ago"
    lines = {
        "state": f"{found.state}, {found.by}" if found.by else found.state,
        "step": f"{found.step or 0:,} of {found.steps:,}{share}, {sign}",
        **{name.rstrip("/"): text for name in LOSSES if (text := _terms(found.losses, name))},
        "saved": saved,
        "disk": f"{_many(found.checkpoints, 'checkpoint')}, {shown_bytes(found.checkpoint_bytes)}",
        "pace": pace,
        "left": left,
        "goodput": "not known yet" if found.goodput is None else f"{found.goodput:.0%}{of_time}",
        "lives": ", ".join(
            _many(count, what)
            for count, what in (
                (found.restarts, "restart"),
                (found.errors, "error"),
                (found.skipped_updates, "skipped update"),
            )
        ),
    }
    if found.last_error and found.seconds_since_error is not None:
        lines["error"] = f"{clock(found.seconds_since_error)} ago: {found.last_error}"
    return "\n".join([f"run {found.run}", *(f"  {name:8} {text}" for name, text in lines.items())])


def _first_of_last(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first error of the last life that had any: those behind it are of other ranks, which it took along."""
    first: dict[str, Any] | None = None
    begun = True
    for event in events:
        if event["event"] in BEGINS:
            begun = True
        elif event["event"] == "error" and begun:
            first, begun = event, False
    return first


def _terms(losses: Mapping[str, float], group: str) -> str:
    """`total 18.7, ar 5.91, nar 6.34`: the values of one group on the board."""
    named = {tag.removeprefix(group): value for tag, value in losses.items() if tag.startswith(group)}
    total = {"total": named.pop("total")} if "total" in named else {}
    return ", ".join(f"{name} {value:.3g}" for name, value in (total | named).items())


def _steps(run: Path) -> int:
    """Updates that the configuration of a run asks for, of pre-training or of tuning."""
    if not (run / runs.CONFIG).exists():
        if (run / "slurm").is_dir():
            raise CheckpointError(f"`{run}` has not started: the script of its Slurm job is written, and no more")
        raise CheckpointError(f"`{run}` must be the folder of a run, it has no {runs.CONFIG}")
    try:
        train = read_yaml(run / runs.CONFIG).get("train")
        if isinstance(train, dict):  # tuning has keys of its own
            train = {key: value for key, value in train.items() if key in TrainConfig.model_fields}
        return configuration.validate(TrainConfig, train, where="train").steps
    except ConfigError as error:
        raise CheckpointError(f"`{run / runs.CONFIG}` is damaged: {error}") from None


def whole_events(run: Path) -> list[dict[str, Any]]:
    """The events that are whole; raises CheckpointError where there is none yet."""
    kinds = {"event": str, "step": int, "time": float}
    events = [
        event for event in runs.read_events(run) if all(isinstance(event.get(key), kind) for key, kind in kinds.items())
    ]
    if not events:
        raise CheckpointError(f"run `{run}` has not begun: {runs.EVENTS} is empty")
    return events


def _verified(store: Store) -> tuple[Progress | None, str | None]:
    """Where the newest intact checkpoint stands, or why there is none."""
    for _ in range(RETRIES):
        before = store.commits()
        try:
            newest = store.latest()
            return Progress.from_json(read_progress(newest)["progress"]) if newest else None, None
        except (FileNotFoundError, CheckpointError) as error:
            if store.commits() == before:  # otherwise retention may have deleted what was being read
                return None, str(error)
    return None, "checkpoints come and go too fast to be read"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _name(step: int | None) -> str | None:
    return None if step is None else f"step-{step:08d}"

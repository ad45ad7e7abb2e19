"""`slurm`: a configuration -> the script of a Slurm job, and copies of code and configuration for it to run.

The script is configs/slurm/job.sbatch, filled in; the reasons stand there. What comes from outside goes into it quoted
for the shell, and into the lines that sbatch reads only if it is made of harmless characters.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import DISK_ERRNOS, ConfigError, UsageError
from pretrain.launch import snapshot

TEMPLATE = snapshot.ROOT / "configs" / "slurm" / "job.sbatch"
WAIT = 20  # seconds; a rank that does not heed the end then has Slurm's KillWait, usually 30
# No quotes, and nothing that sbatch replaces in the name of a file.
PATH = re.compile(r"[\w ./+=:@,-]+")
WORD = re.compile(r"[\w.,:=@/+*&|()\[\]!-]+", re.ASCII)
# minutes, minutes:seconds, hours:minutes:seconds; days-hours, days-hours:minutes, days-hours:minutes:seconds
TIME = re.compile(
    r"(?:(\d{1,4})-(\d{1,3})(?::(\d{1,2}))?(?::(\d{1,2}))?)|(\d{1,6})(?::(\d{1,2}))?(?::(\d{1,2}))?", re.ASCII
)
# Options of sbatch that the script sets or cannot do with.
OURS = {
    "account", "array", "chdir", "cpus-per-task", "error", "gpus-per-node", "input", "job-name", "no-requeue", "nodes",
    "ntasks", "ntasks-per-node", "open-mode", "output", "partition", "requeue", "signal", "time", "wrap",
}  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """What a job needs to know of a configuration of `train` that was loaded. text: all of it, as YAML."""

    name: str
    run_dir: Path
    text: str
    workers: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, the same for both programs."""
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML file of `train`")
    add("overrides", nargs="*", metavar="key=value", help="as for train")
    add("--nodes", type=_at_least(1), required=True, metavar="N")
    add("--gpus-per-node", type=_at_least(0), required=True, metavar="G", help="a rank each; 0: a rank a node, on CPUs")
    add("--time", type=_time, required=True, metavar="T", help="of one start, as 12:00:00 or 2-00")
    add("--partition", type=_word, metavar="P")
    add("--account", type=_word, metavar="A")
    add("--cpus-per-task", type=_at_least(1), metavar="C", help="cores of a rank; default: its data workers, and one")
    add("--sbatch", action="append", default=[], type=_option, metavar="KEY=VALUE", help="as qos=long; repeatable")
    add("--signal-seconds", type=_at_least(1), default=300, metavar="N", help="left for the last save; default 300")
    add("--restarts", type=_at_least(0), default=5, metavar="CAP", help="without a new checkpoint, in a row; default 5")
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--seeds", type=_seeds, metavar="1,2,..", help="job array of the runs NAME-seed1, NAME-seed2 .."
    )
    several.add_argument(
        "--array",
        action="append",
        metavar="'key=value ..'",
        help="element of a job array, of the runs NAME-1 ..; repeatable",
    )
    add("--at-once", type=_at_least(1), metavar="N", help="elements of the array that run together at most")


def write_job(
    program: str, given: argparse.Namespace, load: Callable[[Sequence[str]], Checked], files: Mapping[str, bytes]
) -> None:
    """Checks everything, copies code and configuration into the run folders, prints the script.

    Args:
        program: `pretrain` or `finetune`, whose `train` the job runs.
        given: what `add_arguments` describes.
        load: overrides -> the configuration; raises what `train` would where it, its data or its bundle is wrong.
        files: {file name: content} that `train` gets besides, {"deepspeed_config": ...} as --deepspeed_config.

    Raises:
        ParlanceError: nothing was written.
    """
    limit = _seconds(given.time)
    if given.signal_seconds >= limit:
        raise UsageError(f"`--signal-seconds` must be less than `--time`, which is {limit}, got {given.signal_seconds}")
    if given.at_once and not (given.seeds or given.array):
        raise UsageError(f"`--at-once` must come with `--seeds` or `--array`, got {given.at_once} alone")
    for word in (str(Path.cwd()), *given.words):
        if not word.isprintable():
            raise UsageError(f"this folder and the words of the command must be printable text, got {word!r:.80}")
    base = load(given.overrides)
    elements = dict(_elements(given, base.name))
    runs = [load([*given.overrides, *overrides]) for overrides in elements.values()]
    code = {**snapshot.code(), **files}
    copy = snapshot.fingerprint({**code, **{run.name: run.text.encode() for run in runs}})
    script = _script(program, given, list(elements), base, copy, files)
    try:
        for run in runs:
            snapshot.write(run.run_dir / "slurm" / copy, {**code, "config.yaml": run.text.encode()})
    except OSError as error:
        if error.errno in DISK_ERRNOS:
            raise
        raise ConfigError(f"`runs` must be a folder to write into, `{error.filename}`: {error.strerror}") from None
    folders = ", ".join(str(run.run_dir / "slurm" / copy) for run in runs)
    print(f"copied code and configuration to {folders}", file=sys.stderr)
    print(script, end="")


def _elements(given: argparse.Namespace, name: str) -> Iterator[tuple[int | None, Sequence[str]]]:
    """(number in the job array, overrides) of every run of the job; each has a name of its own."""
    if not given.seeds and not given.array:
        yield None, ()
    for seed in given.seeds or ():
        yield seed, (f"seed={seed}", _named(f"{name}-seed{seed}"))
    for number, words in enumerate(given.array or (), 1):
        try:
            overrides = shlex.split(words)
        except ValueError as error:
            raise UsageError(f"`--array` must be key=value words, got {words!r:.80}: {error}") from None
        if taken := [word for word in overrides if word.partition("=")[0] in ("name", "runs")]:
            raise UsageError(f"`--array` must leave `name` and `runs` alone, got {taken[0]!r:.80}")
        yield number, (*overrides, _named(f"{name}-{number}"))


def _named(name: str) -> str:
    return f"name={json.dumps(name)}"  # quoted, or a name could look like a number or a date


def _script(
    program: str,
    given: argparse.Namespace,
    numbers: Sequence[int | None],
    base: Checked,
    copy: str,
    files: Mapping[str, bytes],
) -> str:
    """configs/slurm/job.sbatch, filled in."""
    here = Path.cwd()
    array = numbers != [None]
    suffix = "" if not array else "-seed" if given.seeds else "-"
    folder = f"{here / base.run_dir}{suffix}"
    if not PATH.fullmatch(folder):
        raise ConfigError(
            "the folder of the run must be made of letters, digits, spaces and ./+=:@,_- for Slurm to write into it, "
            f"got `{folder}`"
        )
    cores = given.cpus_per_task or base.workers + 1
    options = {
        "job-name": base.name,
        "nodes": given.nodes,
        "ntasks-per-node": given.gpus_per_node or 1,
        "gpus-per-node": given.gpus_per_node or None,
        "cpus-per-task": cores,
        "time": given.time,
        "partition": given.partition,
        "account": given.account,
        "array": ",".join(map(str, numbers)) + (f"%{given.at_once}" if given.at_once else "") if array else None,
        "output": f'"{folder}%a/slurm-%A.out"' if array else f'"{folder}/slurm-%j.out"',
        "open-mode": "append",
        "signal": f"B:USR1@{given.signal_seconds}",
        **dict(given.sbatch),
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    arguments = ['"$copy/config.yaml"', *(f'--{name} "$copy/{name}"' for name in files)]
    values = {
        "COMMAND": f"python -m {program} {shlex.join(given.words)}",
        "OPTIONS": "\n".join([*lines, "#SBATCH --requeue"]),
        "FOLDER": shlex.quote(str(here)),
        "PYTHON": shlex.quote(sys.executable),
        "RUN": shlex.quote(folder) + ("$SLURM_ARRAY_TASK_ID" if array else ""),
        "COPY": copy,
        # The number of an element's job alone may stand for the whole array.
        "JOB": "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID",
        "CPUS": str(cores),
        "SECONDS": str(given.signal_seconds),
        "WAIT": str(WAIT),
        "PROGRAM": program,
        "ARGUMENTS": " ".join(arguments),
        "TRIES": str(given.restarts + 1),
    }
    return re.sub(r"@([A-Z]+)@", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def _seconds(time: str) -> int:
    match = TIME.fullmatch(time)
    assert match is not None
    days, hours, minutes, seconds, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None:
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return (first * 60 + second) * 60 + third if match[7] is not None else first * 60 + second


def _time(text: str) -> str:
    if not TIME.fullmatch(text) or not _seconds(text):
        raise argparse.ArgumentTypeError(
            f"must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES], got {text!r:.80}"
        )
    return text


def _word(text: str) -> str:
    if not WORD.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be one word of letters, digits and ._-, got {text!r:.80}")
    return text


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z-]*", key) or not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, a long option of sbatch, got {text!r:.80}")
    if not WORD.fullmatch(value):
        raise argparse.ArgumentTypeError(f"must have a value without spaces and quotes, got {text!r:.80}")
    if key in OURS:
        raise argparse.ArgumentTypeError(f"must leave `{key}` to this command, got {text!r:.80}")
    return key, value


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text) or len(set(map(int, text.split(",")))) <= text.count(","):
        raise argparse.ArgumentTypeError(f"must be different numbers with commas between, got {text!r:.80}")
    return [int(seed) for seed in text.split(",")]


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a number of at least {least}, got {text!r:.80}")
        return int(text)

    return number

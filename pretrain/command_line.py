"""What the programs `python -m pretrain` and `python -m finetune` share: sub-commands, and errors as exit codes."""

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from pretrain import signals
from pretrain.errors import DISK_ERRNOS, EXIT_DISK, EXIT_DONE, ParlanceError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def run(
    program: str, description: str, commands: Sequence[Callable[..., None]], arguments: Sequence[str] | None
) -> int:
    """Runs the sub-command that `arguments` (default: the process's own) ask for.

    commands: each adds its parser and sets its `run`. Signals are dealt with where the arguments are the process's own.

    Returns:
        the exit code that `pretrain.errors` documents; a ParlanceError is printed as one line.
    """
    owned = arguments is None and threading.current_thread() is threading.main_thread()
    with signals.ending() if owned else contextlib.nullcontext():
        return _run(program, description, commands, arguments)


def _run(
    program: str, description: str, commands: Sequence[Callable[..., None]], arguments: Sequence[str] | None
) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    # The deepspeed launcher puts this in front of the command; ranks are read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in commands:
        add(added)
    given, rest = parser.parse_known_args(arguments)
    # argparse takes the overrides on one side of an option only.
    settings = [word for word in rest if "=" in word and not word.startswith("-") and hasattr(given, "overrides")]
    if len(settings) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in settings)}")
    if settings:
        given.overrides += settings
    given.words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        given.run(given)
    except ParlanceError as error:
        if not (error.shared and int(os.environ.get("RANK", "0"))):
            _tell(str(error))
        return error.exit_code
    except OSError as error:
        if error.errno not in DISK_ERRNOS:
            raise
        _tell(f"`{error.filename}` cannot be written: {error.strerror}")
        return EXIT_DISK
    return EXIT_DONE


def _tell(message: str) -> None:
    with contextlib.suppress(OSError):  # a log may lie on the disk that is full
        print(f"error: {message}", file=sys.stderr, flush=True)

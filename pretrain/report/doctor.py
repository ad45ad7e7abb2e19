"""`doctor`: can training start on this machine, in this folder, in this shell; and what to do where it cannot.

`ok` is fine, `warn` costs speed or a feature, `FAIL` keeps training from starting. Nothing heavy is imported before the
check that is about it, so that a broken installation still gets its report.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from pretrain.errors import ConfigError
from pretrain.report.check_machine import cores, disk, environment, hub, memory, one_line, port
from pretrain.report.check_software import (
    INSTALL,
    apex,
    deepspeed,
    devices,
    kernels,
    packages,
    python,
    ranks,
    tensorboard,
)
from pretrain.report.findings import Check

Looks: TypeAlias = Callable[[], Iterator[Check]]

CHECKS: Sequence[Looks] = (
    python, packages, devices, kernels, deepspeed, ranks, tensorboard, apex, cores, memory, disk, port, environment, hub
)  # fmt: skip


def doctor() -> None:
    """Runs every check and prints its lines as they come.

    Raises:
        ConfigError: training cannot start here; names the checks that failed.
    """
    failed = []
    for check in CHECKS:
        for line in _lines(check):
            print(f"{line.level:4}  {line.name:12} {line.text}", flush=True)
            failed += [line.name] if line.level == "FAIL" else []
    if failed:
        raise ConfigError(f"training cannot start here until this is right: {', '.join(failed)}")


def _lines(check: Looks) -> Iterator[Check]:
    """What `check` says; a package that cannot even be imported, for whatever reason, is a line as well."""
    try:
        yield from check()
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        yield Check("FAIL", check.__name__, f"cannot be looked at: {reason}; {INSTALL}")

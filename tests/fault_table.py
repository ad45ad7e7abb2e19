"""The fault matrix: which faults are tried, how often, and the table of `make test-faults`.

A test says what it tries with `@pytest.mark.fault("row", trials=N)`; N counts when it passes. With `--fault-table`
only such tests run, slow ones too, and the session fails unless every row was tried as often as it must be.
"""

from collections.abc import Iterator

import pytest

# {row: how often it must be tried, without one failure}
ROWS = {
    "kill -9 of the whole job at random moments": 200,
    "kill -9 at a file operation of a save, retention or recovery": 60,
    "kill of one rank": 50,
    "stop of one rank": 10,
    "death of a host under Slurm": 5,
    "quickstart-size job through a requeue and a resize": 4,
    "signals in each phase": 60,
    "disk full, over quota, read-only, EIO": 40,
    "resume in another world, ZeRO stage or tensor-parallel degree": 12,
    "resume ten times in a row": 40,
    "hostile hostfile, environment, path, YAML, checkpoint or shard": 200,
    "configuration fuzz": 2000,
    "secrets planted in the environment": 10,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("fault"):
            (row,), trials = marker.args, marker.kwargs.get("trials", 1)
            if row not in ROWS:
                raise pytest.UsageError(f"{item.nodeid}: `fault` must be one of {list(ROWS)}, got {row!r}")
            item.user_properties.append(("fault", [row, trials]))
    if config.getoption("--fault-table"):
        chosen = [item for item in items if any(name == "fault" for name, _ in item.user_properties)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not session.config.getoption("--fault-table"):
        return
    if session.exitstatus == pytest.ExitCode.OK and any(not line.endswith("pass |") for line in _lines(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--fault-table"):
        terminalreporter.section("faults")
        for line in ("| fault | tried | must | |", "| --- | ---: | ---: | --- |", *_lines(terminalreporter)):
            terminalreporter.write_line(line)


def _lines(reporter: pytest.TerminalReporter) -> list[str]:
    tried, failed, skipped = dict.fromkeys(ROWS, 0), dict.fromkeys(ROWS, 0), dict.fromkeys(ROWS, 0)
    for outcome, counted in (("passed", tried), ("failed", failed), ("error", failed), ("skipped", skipped)):
        for row, trials in _faults(reporter.stats.get(outcome, [])):
            counted[row] += trials
    lines = []
    for row, must in ROWS.items():
        verdict = "fail" if failed[row] else "pass" if tried[row] >= must else "skipped" if skipped[row] else "too few"
        lines.append(f"| {row} | {tried[row]} | {must} | {verdict} |")
    return lines


def _faults(reports: list[pytest.TestReport]) -> Iterator[tuple[str, int]]:
    for report in reports:
        if report.when == "call" or not report.passed:  # a test that fails or skips may end before its call
            yield from (value for name, value in getattr(report, "user_properties", ()) if name == "fault")

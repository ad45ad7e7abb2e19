"""RESULTS.md: every number beside the paper's, verdicts, what it took, and the commands."""

import platform
from collections.abc import Iterator, Sequence

from finetune.report.page import table
from finetune.reproduce.claim import Claim, Comparison, Row
from finetune.reproduce.step import Queue, Step

BEGIN, END = "<!-- results -->", "<!-- /results -->"
USUAL = f"""# Results

Does what the papers claim come out here, too? `make reproduce` trains and scores every row, and writes what stands
between the two marks below; remarks around them stay.

{BEGIN}
{END}
"""


def fill(page: str, content: str) -> str:
    """`page` with what stands between its marks replaced; a page without marks is begun anew."""
    if BEGIN not in page or END not in page:
        page = USUAL
    head, rest = page.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{content}\n{rest[rest.index(END) :]}"


def results(claims: Sequence[Claim], queue: Queue, command: str) -> str:
    """Markdown of all that is known; claims of one heading, of several rounds and seeds, are one section."""
    steps = list({step.name: step for claim in claims for step in claim.steps}.values())
    by_heading: dict[str, list[Claim]] = {}
    for claim in claims:
        by_heading.setdefault(claim.heading, []).append(claim)
    sections = ["\n".join(_section(group)) for group in by_heading.values()]
    return "\n\n".join(["\n".join(_took(steps, queue, command)), *sections, "\n".join(_commands(steps, queue))])


def _took(steps: Sequence[Step], queue: Queue, command: str) -> Iterator[str]:
    import torch

    stamps = [stamp for step in steps if (stamp := queue.stamp(step)) is not None]
    hours = sum(stamp["seconds"] for stamp in stamps) / 3600
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    yield f"`{command}`: {len(stamps)} of {len(steps)} steps are done, {hours:.1f} hours of them together, on {device},"
    yield (
        f"{queue.threads} cores, {queue.jobs} steps at once, torch {torch.__version__}. "
        "A row that has no number yet is left out."
    )


def _section(claims: Sequence[Claim]) -> Iterator[str]:
    first = claims[0]
    yield f"## {first.heading}"
    yield ""
    yield f"*{first.where}.* {first.about}"
    yield ""
    rows = [cells for claim in claims for row in claim.rows if (cells := _cells(row)) is not None]
    if not rows:
        yield "Nothing is measured yet."
        return
    yield table(first.columns, rows, words=len(first.columns))
    verdicts = [cells for claim in claims for one in claim.comparisons if (cells := _verdict(one)) is not None]
    if verdicts:
        yield ""
        yield table(["claim", "here", "paper", "verdict"], verdicts, words=4)


def _cells(row: Row) -> list[str] | None:
    """The cells of a row; None where not one number is known."""
    known = [value if isinstance(value, int | str) else value.read() for value in row.values]
    if all(number is None for value, number in zip(row.values, known, strict=True) if not isinstance(value, int | str)):
        return None
    return [row.label, *(_number(value) for value in known), *row.paper]


def _number(value: float | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _verdict(one: Comparison) -> list[str] | None:
    found = one.measured()
    if found is None:
        return None
    better, worse, p_value = found
    return [one.label, f"{better:.2f}, {worse:.2f}", one.paper, one.verdict(better, worse, p_value, one.smaller)]


def _commands(steps: Sequence[Step], queue: Queue) -> Iterator[str]:
    yield "## Commands"
    yield ""
    yield "Every step that is done, with the seconds it took in its last life."
    yield ""
    yield "<details>"
    yield ""
    yield "```sh"
    for step in steps:
        stamp = queue.stamp(step)
        if stamp is not None:
            yield f"{step.line}  # {stamp['seconds']:.0f} s"
    yield "```"
    yield ""
    yield "</details>"

"""A claim of a paper: a table of what came out beside what the paper says, and comparisons with a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from finetune.reproduce.step import Step
from finetune.reproduce.study import Tuned, Written
from pretrain.parsing import read_json

SURE = 0.05  # p-value below which a difference is taken for one


class Value(Protocol):
    """A number that a step leaves. steps: that make it."""

    @property
    def steps(self) -> Sequence[Step]: ...

    def read(self) -> float | None:
        """The number; None before the steps have run."""
        ...


@dataclass(frozen=True)
class Score:
    """A metric of texts."""

    written: Written
    metric: str

    @property
    def steps(self) -> Sequence[Step]:
        return (self.written.scored,)

    def read(self) -> float | None:
        content = _content(self.written.scored)
        return None if content is None else float(content["scores"][self.metric])


@dataclass(frozen=True)
class ValidLoss:
    """The validation loss of a tuned run, at its last measurement until `tuned.updates`."""

    tuned: Tuned
    term: str = "valid/total"

    @property
    def steps(self) -> Sequence[Step]:
        return (self.tuned.kept,)

    def read(self) -> float | None:
        from finetune.report.record import read_curves
        from pretrain import runs

        if not self.tuned.bundle.exists():
            return None
        curve = read_curves(self.tuned.run / runs.BOARD).get(self.term, [])
        return next((value for step, value in reversed(curve) if step <= self.tuned.updates), None)


@dataclass(frozen=True)
class Row:
    """A line of a table. paper: its own columns, already text."""

    label: str
    values: Sequence[Value | int | str]
    paper: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """`better` is claimed to be above `worse`, or below where `smaller`. test: paired bootstrap. paper: both there."""

    label: str
    better: Value
    worse: Value
    paper: str
    test: Step | None = None
    metric: str = ""
    smaller: bool = False

    @property
    def steps(self) -> Sequence[Step]:
        return (*self.better.steps, *self.worse.steps, *([self.test] if self.test else []))

    def measured(self) -> tuple[float, float, float | None] | None:
        """(better, worse, p or None); None before both are there."""
        values = self.better.read(), self.worse.read()
        if values[0] is None or values[1] is None:
            return None
        tested = None if self.test is None else _content(self.test)
        return values[0], values[1], None if tested is None else float(tested["against"][self.metric]["p_value"])

    @staticmethod
    def verdict(better: float, worse: float, p_value: float | None, smaller: bool = False) -> str:
        """What a reader takes away."""
        gain = worse - better if smaller else better - worse
        if p_value is not None and p_value >= SURE:
            return f"no sure difference (p {p_value:.3f})"
        sure = "" if p_value is None else f" (p {p_value:.3f})"
        return f"{'holds' if gain > 0 else 'equal' if gain == 0 else 'does not hold'}{sure}"


@dataclass(frozen=True)
class Claim:
    """heading, where: what is claimed, and in which paper. about: how it is tested here, a sentence or two.

    columns: of the table, those of `Row.values` and then those of `Row.paper`.
    """

    heading: str
    where: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]

    @property
    def steps(self) -> list[Step]:
        """Everything the claim needs, what is needed first, first."""
        values = [value for row in self.rows for value in row.values if not isinstance(value, int | str)]
        wanted = [step for value in values for step in value.steps]
        wanted += [step for one in self.comparisons for step in one.steps]
        return with_needs(wanted)


def with_needs(steps: Sequence[Step]) -> list[Step]:
    """`steps` and all they need, each once and behind what it needs."""
    found: dict[str, Step] = {}

    def add(step: Step) -> None:
        if step.name not in found:
            for need in step.needs:
                add(need)
            found[step.name] = step

    for step in steps:
        add(step)
    return list(found.values())


def _content(step: Step) -> dict[str, Any] | None:
    path = step.output
    return read_json(path) if path is not None and path.exists() else None

"""What the texts of a way are worth and what they took; when training reached the quality that all runs reach."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

from finetune.decoding import Exits
from finetune.report.record import Record
from finetune.report.texts import Text
from finetune.report.ways import Way
from finetune.scores import Scores, score
from finetune.tasks import Pair

ALWAYS = ("repetition", "length_ratio")  # what shows where parallel writing goes wrong, whatever the task


@dataclass(frozen=True)
class Measured:
    """A way and its texts, in the order of the pairs. milliseconds: of the median sentence, alone in its batch."""

    way: Way
    texts: Sequence[Text]
    scores: Scores

    @property
    def milliseconds(self) -> float:
        return 1000 * median(text.seconds for text in self.texts)

    @property
    def slow(self) -> float:
        """Milliseconds within which nine of ten sentences were written."""
        times = [1000 * text.seconds for text in self.texts]
        return quantiles(times, n=10, method="inclusive")[-1] if len(times) > 1 else times[0]

    @property
    def passes(self) -> float:
        """Mean decoder passes a sentence."""
        return fmean(text.passes for text in self.texts)

    @property
    def cut(self) -> int:
        """Sources that were too long."""
        return sum(text.cut for text in self.texts)

    @property
    def exits(self) -> Exits | None:
        """Where all tokens left; None where they all went through."""
        found = [text.exits for text in self.texts if text.exits]
        return sum(found[1:], found[0]) if found else None

    @property
    def calls(self) -> Counter[int]:
        """How many of the texts each call of the program wrote."""
        return Counter(text.call for text in self.texts)


@dataclass(frozen=True)
class Reached:
    """When a run's texts of one mode were first as good as a level. device_seconds: of updates until then."""

    record: Record
    mode: str
    updates: int
    device_seconds: float


def measure(
    ways: Sequence[Way], written: Sequence[Sequence[Text]], pairs: Sequence[Pair], metrics: Sequence[str]
) -> list[Measured]:
    """Scores the texts of every way; here references are first read."""
    targets, sources = [pair.target for pair in pairs], [pair.source for pair in pairs]
    return [
        Measured(way, texts, score([text.text for text in texts], targets, metrics, sources=sources))
        for way, texts in zip(ways, written, strict=True)
    ]


def equal_quality(records: Sequence[Record], metric: str) -> tuple[float, list[Reached]]:
    """The best validation score that every run and mode reached, and when each first had it; none of fewer than two."""
    curves = {(n, mode): curve for n, record in enumerate(records) for mode, curve in record.scores(metric).items()}
    if len(curves) < 2:
        return 0.0, []
    level = min(max(value for _, value in curve) for curve in curves.values())
    reached = []
    for (number, mode), curve in curves.items():
        step = next(step for step, value in curve if value >= level)
        reached.append(Reached(records[number], mode, step, records[number].cost.until(step)))
    return level, sorted(reached, key=lambda one: one.device_seconds)

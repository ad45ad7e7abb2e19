"""What becomes of an update whose loss or gradient is not finite, or whose loss is a spike: `train.on_nonfinite`.

    stop      training ends with exit code 7
    skip      its samples are jumped over, at most `train.max_skips` times in a row
    rewind    back to the last verified checkpoint, whose way then leads past these samples; as often without a new one

Skipped or rewound, the run is to the bit the one that these samples were never part of: a bad update changes neither
weights nor moments, generators or the number of updates. What was jumped over stands in events.jsonl, so that a run
that is killed meanwhile goes the same way.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pretrain.config import TrainConfig
from pretrain.distributed import shared
from pretrain.errors import LossSpike, NonFiniteError
from pretrain.loop import Guard, StepReport, Window

RECENT, FEWEST = 64, 16  # updates that a spike is measured by, and without which nothing is one


class Policy(Guard):
    """A guard and a hook. record: writes an event, on every rank.

    jumped: samples that rewinding has left out, {first: count}. rewinds: in a row, to the same checkpoint.
    """

    def __init__(self, train: TrainConfig, record: Callable[..., None]) -> None:
        self.train, self.record = train, record
        self.in_a_row = self.rewinds = self.rewound_to = 0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.jumped: dict[int, int] = {}

    def after_step(self, report: StepReport) -> None:
        self.in_a_row = 0
        if report.applied:
            self.recent.append(report.total)

    def forget(self, report: StepReport) -> None:
        """The last update will be told once more."""
        if report.applied and self.recent:
            self.recent.pop()

    def check(self, step: int, total: float) -> None:
        if not self.train.spike_factor or len(self.recent) < FEWEST:
            return
        usual = statistics.median(self.recent)
        if total > self.train.spike_factor * usual:
            raise shared(
                LossSpike(
                    f"loss must be at most {self.train.spike_factor:g} times its median of {len(self.recent)} updates "
                    f"({usual:.4g}), was {total:.4g} at step {step}; not applied"
                )
            )

    def pardon(self, error: NonFiniteError, window: Window) -> None:
        error.samples = (window.first, window.count)
        if self.train.on_nonfinite != "skip":
            raise error
        if self.in_a_row == self.train.max_skips:
            raise type(error)(f"{error}; {self.in_a_row} updates before it were skipped, `train.max_skips`")
        self.in_a_row += 1
        self.record("skip", samples=list(error.samples), message=str(error))

    def rewind(self, error: NonFiniteError, step: int) -> bool:
        """Whether training goes back to `step` for `error`; its samples are then left out from now on."""
        if step != self.rewound_to:
            self.rewound_to, self.rewinds = step, 0
        if self.train.on_nonfinite != "rewind" or self.rewinds == self.train.max_skips:
            return False
        self.rewinds += 1
        if error.samples:
            first, count = error.samples
            self.jumped[first] = count
        return True

    def past(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Takes over what earlier lives have left out, from events.jsonl."""
        for event in events:
            samples = event.get("samples")
            if event.get("event") == "rewind" and isinstance(samples, list) and len(samples) == 2:
                first, count = samples
                if type(first) is int and type(count) is int:
                    self.jumped[first] = count

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        found: dict[str, Any] = {"jumped": [list(one) for one in sorted(self.jumped.items())]} if self.jumped else {}
        return found | ({"recent": list(self.recent)} if self.train.spike_factor else {})

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Sets what `to_json` gave; an older checkpoint has nothing of it."""
        recent = saved.get("recent")
        self.in_a_row = 0
        self.recent.clear()
        if isinstance(recent, list):
            self.recent.extend(float(value) for value in recent if isinstance(value, int | float))

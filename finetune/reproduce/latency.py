"""The claim about speed, one sentence at a time: the table of `kernels/bench/writing.py`, random weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.reproduce.claim import Claim, Comparison, Row
from finetune.reproduce.step import PYTHON, Step
from finetune.reproduce.study import Desk
from pretrain.parsing import read_json

OURS, THEIRS, CT2 = "parlance", "transformers", "ctranslate2"
# (who, way): latency in the papers, milliseconds on their GPUs for XSum.
LINES = {
    (THEIRS, "AR, beam 5"): "322.78 (BART, JANUS's machine)",
    (CT2, "AR, beam 5"): "-",
    (OURS, "AR, beam 5"): "322.78",
    (OURS, "AR, beam 1"): "-",
    (OURS, "JANUS AR, beam 5"): "332.49",
    (OURS, "NAR, 0 iterations"): "36.66",
    (OURS, "NAR, 1 iterations"): "45.51",
    (OURS, "NAR, 4 iterations"): "71.85",
    (OURS, "NAR, 10 iterations"): "128.94",
    (OURS, "hard exit, nobody leaves"): "-",
    (OURS, "hard exit, all leave at layer 1"): "12.39 (ELMER-Hard; BART 185.19)",
    (OURS, "soft exit"): "11.94 (ELMER-Soft)",
}
BATCH = 1


@dataclass(frozen=True)
class Timed:
    """A column of a row of the table; of the shallow model the first one timed."""

    step: Step
    who: str
    way: str
    column: str

    @property
    def steps(self) -> Sequence[Step]:
        return (self.step,)

    def read(self) -> float | None:
        file = self.step.makes
        if file is None or not file.exists():
            return None
        key = (BATCH, self.who, self.way)
        rows = [row for row in read_json(file)["rows"] if (row["batch"], row["by"], row["way"]) == key]
        return float(rows[0][self.column]) if rows else None


@dataclass(frozen=True)
class Ratio:
    """How many times as long `slow` takes as `fast`."""

    slow: Timed
    fast: Timed

    @property
    def steps(self) -> Sequence[Step]:
        return self.slow.steps

    def read(self) -> float | None:
        slow, fast = self.slow.read(), self.fast.read()
        return None if slow is None or fast is None else slow / fast


@dataclass(frozen=True)
class Bound:
    """A number that is known."""

    value: float
    steps: Sequence[Step] = ()

    def read(self) -> float:
        return self.value


def speed(desk: Desk) -> Claim:
    """All at once against left to right."""
    out = desk.folder / "writing.json"
    command = (PYTHON, "kernels/bench/writing.py", *desk.study.latency, "--out", str(out))
    step = Step("latency", command, makes=out, alone=True)
    rows = [
        Row(
            f"{who}: {way}",
            [Timed(step, who, way, column) for column in ("ms_a_sentence", "speedup", "passes")],
            [paper],
        )
        for (who, way), paper in LINES.items()
    ]
    once = Timed(step, OURS, "NAR, 0 iterations", "ms_a_sentence")
    paper = {THEIRS: "8 to 16 times", OURS: "9.1 times (JANUS, Table 2)", CT2: "-"}
    comparisons = []
    for who, said in paper.items():
        ratio = Ratio(Timed(step, who, "AR, beam 5", "ms_a_sentence"), once)
        label = f"{who}, AR, beam 5 / NAR, 0 iterations, at least 8"
        comparisons.append(Comparison(label, ratio, Bound(8.0), said))
    return Claim(
        "All at once is 8 to 16 times as fast as left to right, one sentence at a time",
        "JANUS, Table 2; ELMER, Table 1",
        "BART-base's shape, random weights, fixed lengths; each time after its texts were held against another side's. "
        "Speed-up: over transformers at beam 5.",
        ["", "ms a sentence", "speed-up", "decoder passes", "paper: ms"],
        rows,
        comparisons,
    )

"""JANUS's claims about translation, on Multi30k German -> English from random weights: Tables 1, 3 and 6, Figure 4."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from finetune.reproduce.claim import Claim, Comparison, Row, Score
from finetune.reproduce.step import PYTHON, Step
from finetune.reproduce.study import AR, NAR, Desk, Tuned, Written

METRICS = "bleu,repetition,length_ratio"
BOTH = {**AR, **NAR}


@dataclass(frozen=True)
class System:
    """A row of the ablation. runner: file of configs/finetune/multi30k. paper: BLEU on IWSLT14 De-En, AR and NAR."""

    name: str
    runner: str
    ways: Mapping[str, tuple[str, ...]]
    paper: tuple[str, str]
    overrides: tuple[str, ...] = ()


def _terms(**weights: float) -> tuple[str, ...]:
    every = {"ar": 0.0, "nar": 0.0, "aux": 0.0, "kl_ar_aux": 0.0, "kl_nar_aux": 0.0, "kl_ar_nar": 0.0}
    return tuple(f"runner.weights.{name}={weight:g}" for name, weight in (every | weights).items())


MAIN = (
    System("Transformer", "ar", AR, ("34.74", "-")),
    System("CMLM", "nar", NAR, ("-", "32.10")),
    System("JANUS", "janus", BOTH, ("37.24", "34.21")),
)
OTHERS = (
    System("AR + NAR", "janus", BOTH, ("35.25", "32.12"), _terms(ar=1, nar=1)),
    System("AR + NAR + KL", "janus", BOTH, ("36.08", "33.45"), _terms(ar=1, nar=1, kl_ar_nar=2)),
    System("AUX alone", "janus", BOTH, ("0.91", "24.41"), _terms(aux=1)),
)
REPETITION = {"CMLM": ("7.42", "1.58", "0.83"), "JANUS": ("6.8", "1.43", "0.65")}


class TranslationPart:
    """All systems at all rounds and seeds; the parts of the study take from it what their claims need."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.settings = desk, desk.study.translation
        self.written: dict[tuple[str, int, int], dict[str, Written]] = {}
        for system in (*MAIN, *OTHERS):
            for seed in desk.study.seeds:
                self._system(system, seed)

    def _system(self, system: System, seed: int) -> None:
        earlier: Tuned | None = None
        for updates in [one.translation for one in self.desk.study.rounds]:
            begun = self._begin(seed)
            needs = [begun, *([earlier.kept] if earlier else [])]
            name = f"multi30k-{system.name.replace(' + ', '-').replace(' ', '-').lower()}-{seed}"
            overrides = [*self._task(seed), *self.settings.overrides, *system.overrides]
            earlier = self.desk.tune(name, f"multi30k/{system.runner}", updates, overrides, needs)
            self.written[system.name, seed, updates] = {
                way: self.desk.write(earlier, way, how, METRICS) for way, how in system.ways.items()
            }

    def _task(self, seed: int) -> list[str]:
        data = f"{self.desk.study.data}/multi30k"
        return [f"seed={seed}", f"task.path={data}", f"bundle={self.desk.folder}/bundles/multi30k-{seed}"]

    def _begin(self, seed: int) -> Step:
        command = (PYTHON, "-m", "finetune", "begin", "configs/finetune/multi30k/ar.yaml", *self._task(seed))
        model = ("--model", self.desk.study.model, "--train-tokenizer", str(self.settings.vocabulary))
        return Step(f"begin/multi30k-{seed}", (*command, *model))

    def better_both_ways(self, updates: int, seed: int, ablation: bool) -> Claim:
        """JANUS against the systems of one loss, or against the rest of the ablation."""
        nar = "NAR, 10 iterations"
        rows, comparisons = [], []
        for system in (*MAIN, *OTHERS) if ablation else MAIN:
            written = self.written[system.name, seed, updates]
            values = [Score(written[way], "bleu") if way in written else "-" for way in BOTH]
            rows.append(Row(system.name, [updates, seed, *values], system.paper))
        rivals = (
            {"AR, beam 5": "AR + NAR + KL", nar: "AR + NAR + KL"}
            if ablation
            else {"AR, beam 5": "Transformer", nar: "CMLM"}
        )
        paper = {system.name: system.paper for system in (*MAIN, *OTHERS)}
        for column, (way, rival) in enumerate(rivals.items()):
            mine, theirs = self.written["JANUS", seed, updates][way], self.written[rival, seed, updates][way]
            label = f"JANUS, {way} > {rival}, {way}"
            test = self.desk.compare(
                f"bleu-{updates}-{seed}-{way[:2].lower()}-{rival.replace(' + ', '-').lower()}", mine, theirs, "bleu"
            )
            comparisons.append(
                Comparison(
                    f"{label} ({updates} updates, seed {seed})", Score(mine, "bleu"), Score(theirs, "bleu"),
                    f"{paper['JANUS'][column]} > {paper[rival][column]}", test, "bleu",
                )
            )  # fmt: skip
        heading = (
            "The rows of the ablation"
            if ablation
            else "JANUS writes better than a Transformer left to right, and than CMLM all at once"
        )
        return Claim(
            heading,
            "JANUS, Table 6" if ablation else "JANUS, Table 1",
            "Multi30k, German to English, raw targets, random weights: the same model, data, batch, rate and updates "
            "for every row. BLEU is sacreBLEU's on lower-cased text, in the paper tokenised BLEU on IWSLT14 De-En. No "
            "checkpoints are averaged.",
            ["", "updates", "seed", *BOTH, "paper: AR", "paper: NAR, 10"],
            rows,
            comparisons,
        )

    def iterations(self, updates: int, seed: int) -> Claim:
        """Quality and repetition by iterations."""
        rows, comparisons = [], []
        ways = list(NAR)
        for name in ("CMLM", "JANUS"):
            written = self.written[name, seed, updates]
            values = [Score(written[way], metric) for metric in ("bleu", "repetition") for way in ways]
            rows.append(Row(name, [updates, seed, *values], [" / ".join(REPETITION[name])]))
            for metric, smaller in (("bleu", False), ("repetition", True)):
                for before, after in pairwise(ways):
                    label = f"{name}, {metric}: {after} {'<' if smaller else '>'} {before}"
                    comparisons.append(
                        Comparison(
                            f"{label} ({updates} updates, seed {seed})", Score(written[after], metric),
                            Score(written[before], metric), "the same way", smaller=smaller,
                        )
                    )  # fmt: skip
        for way in ways:
            mine, theirs = (self.written[name, seed, updates][way] for name in ("JANUS", "CMLM"))
            test = self.desk.compare(f"iterations-{updates}-{seed}-{way.split()[1]}", mine, theirs, "bleu")
            comparisons.append(
                Comparison(
                    f"JANUS > CMLM, {way} ({updates} updates, seed {seed})", Score(mine, "bleu"), Score(theirs, "bleu"),
                    "above at every step", test, "bleu",
                )
            )  # fmt: skip
        return Claim(
            "More iterations write better texts with fewer repeated words, and JANUS stays above CMLM",
            "JANUS, Table 3 and Figure 4",
            "The same runs. Repetition: percent of words equal to the one before.",
            [
                "",
                "updates",
                "seed",
                *(f"{metric}, {way}" for metric in ("BLEU", "repetition") for way in ways),
                "paper: repetition after 1 / 4 / 10",
            ],
            rows,
            comparisons,
        )

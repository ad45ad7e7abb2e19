"""JANUS's claims about translation, on Multi30k German -> English from random weights: Tables 1, 3 and 6, Figure 4."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from finetune.reproduce.claim import Claim, Comparison, Row, Score
from finetune.reproduce.step import PYTHON, Step
from finetune.reproduce.study import AR, NAR, Desk, Tuned, Written

METRICS = "bleu,repetition,length_ratio"
BOTH = {**AR, **NAR}
LEFT_TO_RIGHT, AT_ONCE = "AR, beam 5", "NAR, 10 iterations"
ABOUT = (
    "Multi30k, German to English, raw targets, random weights: the same model, data, batch, rate and updates for every "
    "row. BLEU is sacreBLEU's on lower-cased text, in the paper tokenised BLEU on IWSLT14 De-En. No checkpoints are "
    "averaged."
)


@dataclass(frozen=True)
class System:
    """A row. runner: file of configs/finetune/multi30k. paper: BLEU on IWSLT14 De-En, AR and NAR of 10 iterations."""

    name: str
    runner: str
    ways: Mapping[str, tuple[str, ...]]
    paper: tuple[str, str]
    overrides: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        return self.name.replace(" + ", "-").replace(" ", "-").lower()


def _terms(**weights: float) -> tuple[str, ...]:
    """Overrides that leave these terms of the JANUS loss; a symmetric KL of weight 2 is both directions of weight 1."""
    every = {"ar": 0.0, "nar": 0.0, "aux": 0.0, "kl_ar_aux": 0.0, "kl_nar_aux": 0.0, "kl_ar_nar": 0.0}
    return tuple(f"runner.weights.{name}={weight:g}" for name, weight in (every | weights).items())


TRANSFORMER = System("Transformer", "ar", AR, ("34.74", "-"))
CMLM = System("CMLM", "nar", NAR, ("-", "32.10"))
JANUS = System("JANUS", "janus", BOTH, ("37.24", "34.21"))
TOGETHER = System("AR + NAR", "janus", BOTH, ("35.25", "32.12"), _terms(ar=1, nar=1))
TIED = System("AR + NAR + KL", "janus", BOTH, ("36.08", "33.45"), _terms(ar=1, nar=1, kl_ar_nar=2))
AUX = System("AUX alone", "janus", BOTH, ("0.91", "24.41"), _terms(aux=1))
ABLATION = (TRANSFORMER, CMLM, AUX, TOGETHER, TIED, JANUS)
REPETITION = {"CMLM": "7.42 / 1.58 / 0.83", "JANUS": "6.8 / 1.43 / 0.65"}  # after 1, 4 and 10 iterations


class Translations:
    """Every system at every round and seed. A claim of it is of one round and one seed."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._written: dict[tuple[str, int, int], dict[str, Written]] = {}
        for system in ABLATION:
            for seed in desk.study.seeds:
                self._train(system, seed)

    def main(self, updates: int, seed: int) -> Claim:
        """JANUS against the systems of one loss."""
        rivals = [(LEFT_TO_RIGHT, TRANSFORMER), (AT_ONCE, CMLM)]
        heading = "JANUS writes better than a Transformer left to right, and than CMLM all at once"
        return self._table(heading, "JANUS, Table 1", (TRANSFORMER, CMLM, JANUS), rivals, updates, seed)

    def ablation(self, updates: int, seed: int) -> Claim:
        """All losses against those without AUX."""
        rivals = [(way, system) for system in (TOGETHER, TIED) for way in (LEFT_TO_RIGHT, AT_ONCE)]
        heading = "Each loss of JANUS helps"
        return self._table(heading, "JANUS, Table 6", ABLATION, rivals, updates, seed)

    def iterations(self, updates: int, seed: int) -> Claim:
        """Quality and repetition by iterations."""
        at, ways = f"{updates} updates, seed {seed}", list(NAR)
        rows, comparisons = [], []
        for system in (CMLM, JANUS):
            written = self._written[system.name, seed, updates]
            values = [Score(written[way], metric) for metric in ("bleu", "repetition") for way in ways]
            rows.append(Row(system.name, [updates, seed, *values], [REPETITION[system.name]]))
            for before, after in pairwise(ways):
                bleu, repetition = (
                    (Score(written[after], name), Score(written[before], name)) for name in ("bleu", "repetition")
                )
                label = f"{system.name}, {{}} {after} {{}} {before} ({at})"
                comparisons.append(Comparison(label.format("BLEU:", ">"), *bleu, "rises"))
                comparisons.append(
                    Comparison(label.format("repetition:", "<"), *repetition, "falls", smaller=True)
                )  # fmt: skip
        for way in ways:
            mine, theirs = (self._written[system.name, seed, updates][way] for system in (JANUS, CMLM))
            test = self.desk.compare(f"iterations-{updates}-{seed}-{way.split()[1]}", mine, theirs, "bleu")
            bleu = Score(mine, "bleu"), Score(theirs, "bleu")
            comparisons.append(Comparison(f"JANUS > CMLM, {way} ({at})", *bleu, "above", test, "bleu"))
        shown = [f"{metric}, {way}" for metric in ("BLEU", "repetition") for way in ways]
        return Claim(
            "More iterations write better texts with fewer repeated words, and JANUS stays above CMLM",
            "JANUS, Table 3 and Figure 4",
            "The same runs. Repetition: percent of words equal to the one before.",
            ["", "updates", "seed", *shown, "paper: repetition after 1 / 4 / 10"],
            rows,
            comparisons,
        )

    def _table(
        self,
        heading: str,
        where: str,
        systems: Sequence[System],
        rivals: Sequence[tuple[str, System]],
        updates: int,
        seed: int,
    ) -> Claim:
        """BLEU of systems in each way they write. rivals: (way, system) that JANUS is above in the paper."""
        rows = []
        for system in systems:
            written = self._written[system.name, seed, updates]
            values = [Score(written[way], "bleu") if way in written else "-" for way in BOTH]
            rows.append(Row(system.name, [updates, seed, *values], system.paper))
        comparisons = []
        for way, rival in rivals:
            mine, theirs = (self._written[system.name, seed, updates][way] for system in (JANUS, rival))
            test = self.desk.compare(f"bleu-{updates}-{seed}-{way[:2].lower()}-{rival.slug}", mine, theirs, "bleu")
            label = f"JANUS > {rival.name}, {way} ({updates} updates, seed {seed})"
            column = int(way == AT_ONCE)
            paper = f"{JANUS.paper[column]} > {rival.paper[column]}"
            comparisons.append(Comparison(label, Score(mine, "bleu"), Score(theirs, "bleu"), paper, test, "bleu"))
        columns = ["", "updates", "seed", *BOTH, "paper: AR", "paper: NAR, 10"]
        return Claim(heading, where, ABOUT, columns, rows, comparisons)

    def _train(self, system: System, seed: int) -> None:
        """A round goes on with the run of the one before, behind the step that put its bundle by."""
        settings, earlier = self.desk.study.translation, None
        for updates in [one.translation for one in self.desk.study.rounds]:
            needs = [self._begin(seed), *([earlier.kept] if earlier else [])]
            overrides = [*self._task(seed), *settings.overrides, *system.overrides]
            tuned: Tuned = self.desk.tune(
                f"multi30k-{system.slug}-{seed}", f"multi30k/{system.runner}", updates, overrides, needs
            )
            self._written[system.name, seed, updates] = {
                way: self.desk.write(tuned, way, how, METRICS) for way, how in system.ways.items()
            }
            earlier = tuned

    def _begin(self, seed: int) -> Step:
        command = (PYTHON, "-m", "finetune", "begin", "configs/finetune/multi30k/ar.yaml", *self._task(seed))
        model = ("--model", self.desk.study.model, "--train-tokenizer", str(self.desk.study.translation.vocabulary))
        return Step(f"begin/multi30k-{seed}", (*command, *model))

    def _task(self, seed: int) -> list[str]:
        data = f"{self.desk.study.data}/multi30k"
        return [f"seed={seed}", f"task.path={data}", f"bundle={self.desk.folder}/bundles/multi30k-{seed}"]

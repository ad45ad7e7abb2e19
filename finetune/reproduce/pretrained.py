"""Claims about pre-training, on Wikipedia and books: JANUS's Tables 7 and 8, ELMER's Tables 1 and 3."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.reproduce.claim import Claim, Comparison, Row, Score, ValidLoss, Value
from finetune.reproduce.step import PYTHON, Step
from finetune.reproduce.study import NAR, Desk, Round, TaskName, Tuned, Written

TASKS: dict[TaskName, str] = {"squad_qg": "coco_rougeL,coco_bleu4", "wiki_first_sentence": "rougeL,rouge2,rouge1"}
ALWAYS = "repetition,length_ratio"
WAYS = {name: NAR[name] for name in ("NAR, 0 iterations", "NAR, 4 iterations")}
EXITS = {"hard exit": ("hard_exit", "--threshold", "0.5"), "soft exit": ("soft_exit",)}
# {pre-training: objective}; and {task: the paper's ROUGE-L}.
THREE = {"BART": "denoise", "CMLM": "cmlm", "JANUS": "janus"}
PAPER: dict[TaskName, dict[str, str]] = {
    "squad_qg": {"BART": "42.45", "CMLM": "41.93", "JANUS": "44.99"},
    "wiki_first_sentence": {"BART": "26.95", "CMLM": "27.60", "JANUS": "28.21"},
}
# (pre-trained, not): ROUGE-L of XSum.
ELMER = {"hard exit": ("26.08", "21.96"), "soft exit": ("29.92", "24.00")}
NOTHING = "nothing"


class PretrainedPart:
    """Pre-trains, hands over and tunes; one seed."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.settings = desk, desk.study.pretraining
        self.data = desk.folder / "data"
        self._kept: dict[tuple[str, int], Step] = {}

    def three_ways(self, task: TaskName, given: Round) -> Claim:
        """The same tuning from BART's, CMLM's and JANUS's pre-training, and from none."""
        rows, written, tuned = [], {}, {}
        metrics = TASKS[task].split(",")
        for name in (NOTHING, *THREE):
            tuned[name] = self._tune(task, "nar", THREE.get(name), given)
            written[name] = self._write(tuned[name], task, WAYS)
            scores = [Score(written[name][way], metric) for way in WAYS for metric in (*metrics[:2], "repetition")]
            values: list[Value | int | str] = [self._said(given), ValidLoss(tuned[name]), *scores]
            rows.append(Row(f"pre-trained: {name}", values, [PAPER[task].get(name, "-")]))
        comparisons = []
        for better, worse in (("JANUS", "CMLM"), ("CMLM", "BART"), ("JANUS", "BART")):
            mine, theirs = (written[name]["NAR, 0 iterations"] for name in (better, worse))
            test = self.desk.compare(f"{task}-{given.tuning}-{better}-{worse}".lower(), mine, theirs, metrics[0])
            paper = f"{PAPER[task][better]}, {PAPER[task][worse]}"
            comparisons.append(
                Comparison(
                    f"{better} > {worse}, ROUGE-L, 0 iterations ({self._said(given)})",
                    Score(mine, metrics[0]), Score(theirs, metrics[0]), paper, test, metrics[0],
                )
            )  # fmt: skip
            comparisons.append(
                Comparison(
                    f"{better} < {worse}, validation loss ({self._said(given)})",
                    ValidLoss(tuned[better]), ValidLoss(tuned[worse]), "-", smaller=True,
                )
            )  # fmt: skip
        shown = [f"{metric}, {way}" for way in WAYS for metric in (*metrics[:2], "repetition")]
        return Claim(
            f"Pre-training with JANUS helps all-at-once tuning more than with CMLM, and that more than BART ({task})",
            "JANUS, Table 7" if task == "squad_qg" else "JANUS, Table 8 (XSum)",
            "Wikipedia and books, the same model, text and updates three ways, then runner `nar`. The paper starts all "
            "three from BART-base.",
            ["", "updates", "validation loss", *shown, "paper: ROUGE-L, 0 iterations"],
            rows,
            comparisons,
        )

    def exits(self, task: TaskName, given: Round) -> Claim:
        """Soft against hard exits, each with ELMER's pre-training and without."""
        rows, scores, losses, written = [], {}, {}, {}
        metrics = TASKS[task].split(",")
        for runner, how in EXITS.items():
            for objective in ("lplm", None):
                tuned = self._tune(task, runner.replace(" ", "_"), objective, given)
                texts = self._write(tuned, task, {runner: how})[runner]
                key = runner, objective is not None
                written[key], scores[key], losses[key] = texts, Score(texts, metrics[0]), ValidLoss(tuned)
                values = [Score(texts, metric) for metric in (*metrics[:2], "repetition")]
                label = f"{runner}, {'ELMER' if objective else 'no pre-training'}"
                rows.append(Row(label, [self._said(given), losses[key], *values], [ELMER[runner][objective is None]]))
        pairs = [
            ("soft > hard, pre-trained", ("soft exit", True), ("hard exit", True)),
            ("soft > hard, not pre-trained", ("soft exit", False), ("hard exit", False)),
            ("hard exit: pre-trained > not", ("hard exit", True), ("hard exit", False)),
            ("soft exit: pre-trained > not", ("soft exit", True), ("soft exit", False)),
        ]
        comparisons = []
        for label, better, worse in pairs:
            name = (
                f"{task}-{given.tuning}-{label}".replace(":", "").replace(",", "").replace(" > ", "-").replace(" ", "-")
            )
            test = self.desk.compare(name, written[better], written[worse], metrics[0])
            paper = " > ".join(ELMER[runner][not trained] for runner, trained in (better, worse))
            comparisons.append(
                Comparison(
                    f"{label}, ROUGE-L ({self._said(given)})", scores[better], scores[worse], paper, test, metrics[0]
                )
            )
            if better[0] == worse[0]:  # losses of the two runners are sums over different rows
                comparisons.append(
                    Comparison(
                        f"{label}, validation loss lower ({self._said(given)})", losses[better], losses[worse], "-",
                        smaller=True,
                    )
                )  # fmt: skip
        return Claim(
            f"Soft exits write better than hard ones, and pre-training helps both ({task})",
            "ELMER, Table 3 (XSum)",
            "Pre-training with LPLM on the same text; tuned with each kind of exit. Hard exit at 0.5.",
            ["", "updates", "validation loss", *metrics[:2], "repetition", "paper: ROUGE-L"],
            rows,
            comparisons,
        )

    @staticmethod
    def _said(given: Round) -> str:
        return f"{given.pretraining} + {given.tuning}"

    def _tune(self, task: TaskName, runner: str, objective: str | None, given: Round) -> Tuned:
        tuning, study = self.desk.study.tuning, self.desk.study
        bundle, ready = self._pretrained(objective, given) if objective else self._random()
        data = f"{study.data}/{'squad_qg' if task == 'squad_qg' else 'wikipedia_en'}"
        own = tuning.tasks[task]
        overrides = [f"bundle={bundle}", f"task.path={data}", *tuning.overrides, *own.overrides]
        overrides += own.exits if runner in ("hard_exit", "soft_exit") else []
        before = f"{objective}-{given.pretraining}" if objective else "random"
        return self.desk.tune(
            f"{task}-{runner}-{before}".replace("_", "-"), f"{task}/{runner}", given.tuning, overrides, [ready]
        )

    def _write(self, tuned: Tuned, task: TaskName, ways: Mapping[str, tuple[str, ...]]) -> dict[str, Written]:
        return {way: self.desk.write(tuned, way, how, f"{TASKS[task]},{ALWAYS}") for way, how in ways.items()}

    def _random(self) -> tuple[Path, Step]:
        """A bundle of random weights with the tokenizer and the shape of the pre-trained ones."""
        bundle = self.desk.folder / "bundles" / "random"
        data = (f"task.path={self.desk.study.data}/squad_qg", "task.without_train=true")
        command = (PYTHON, "-m", "finetune", "begin", "configs/finetune/squad_qg/nar.yaml", *data)
        rest = ("--model", self.desk.study.model, "--tokenizer", f"{self.data}/tokenizer.json", "--out", str(bundle))
        return bundle, Step("begin/random", (*command, *rest), (self._prepared(),))

    def _pretrained(self, objective: str, given: Round) -> tuple[Path, Step]:
        """The bundle of a pre-training at a round; a later round goes on with the run."""
        earlier = [one for one in self.desk.study.rounds if one.pretraining < given.pretraining]
        needs: Sequence[Step] = [self._prepared()]
        if earlier:
            needs = [*needs, self._pretrained(objective, earlier[-1])[1]]
        name = f"pretrain-{objective}"
        bundle = self.desk.folder / "bundles" / f"{name}-{given.pretraining}"
        overrides = [f"name={name}", f"runs={self.desk.folder}/runs", f"data.path={self.data}"]
        overrides += [f"objective.name={objective}", *self.settings.overrides, f"train.steps={given.pretraining}"]
        trained = Step(
            f"train/{name}-{given.pretraining}", (*self.settings.launch, self.settings.config, *overrides), tuple(needs)
        )
        handoff = (PYTHON, "-m", "pretrain", "handoff", str(self.desk.run(name)), "--out", str(bundle))
        return bundle, Step(f"handoff/{name}-{given.pretraining}", handoff, (trained,))

    def _prepared(self) -> Step:
        """Shards of Wikipedia and books."""
        data, books = Path(self.desk.study.data), self.desk.folder / "books"
        unpacked = tuple(
            Step(f"unpack/{archive.name}", (PYTHON, "-m", "tarfile", "-e", str(archive), str(books)))
            for archive in sorted((data / "books").glob("books_*.tar.gz"))
        )
        s = self.settings
        command = (
            PYTHON, "-m", "pretrain", "prepare", "--out", str(self.data),
            "--source", f"wikipedia=text:{data}/wikipedia_en/*.txt.gz", "--source", f"books=text-file:{books}/*/*.md",
            "--train-tokenizer", str(s.vocabulary), "--max-length", str(s.max_length), "--workers", str(s.workers),
        )  # fmt: skip
        return Step("prepare", command, unpacked)

"""Claims about pre-training, on Wikipedia and books: JANUS's Tables 7 and 8, ELMER's Tables 1 and 3."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.reproduce.claim import Claim, Comparison, Row, Score, ValidLoss, Value
from finetune.reproduce.step import PYTHON, Step
from finetune.reproduce.study import NAR, Desk, Round, TaskName, Tuned, Written

TASKS: dict[TaskName, str] = {"squad_qg": "coco_rougeL,coco_bleu4", "wiki_first_sentence": "rougeL,rouge2,rouge1"}
ALWAYS = "repetition,length_ratio"
WAYS = {name: NAR[name] for name in ("NAR, 0 iterations", "NAR, 4 iterations")}
EXITS = {"hard exit": ("hard_exit", "--threshold", "0.5"), "soft exit": ("soft_exit",)}
# {pre-training: objective}; and {task: the paper's ROUGE-L}. All continue from BART, whose rows begin with EOS.
THREE = {"BART": ["denoise"], "CMLM": ["cmlm"], "JANUS": ["janus", "objective.ar_layout=eos_first"]}
PAPER: dict[TaskName, dict[str, str]] = {
    "squad_qg": {"BART": "42.45", "CMLM": "41.93", "JANUS": "44.99"},
    "wiki_first_sentence": {"BART": "26.95", "CMLM": "27.60", "JANUS": "28.21"},
}
# {(exit, whether pre-trained): ROUGE-L of XSum}.
HARD, SOFT = EXITS
ELMER = {(HARD, True): "26.08", (HARD, False): "21.96", (SOFT, True): "29.92", (SOFT, False): "24.00"}
EXIT_CLAIMS = (
    ("soft > hard, pre-trained", (SOFT, True), (HARD, True)),
    ("soft > hard, not pre-trained", (SOFT, False), (HARD, False)),
    ("hard exit: pre-trained > not", (HARD, True), (HARD, False)),
    ("soft exit: pre-trained > not", (SOFT, True), (SOFT, False)),
)
NOTHING = "nothing"


@dataclass(frozen=True)
class Start:
    """What tuning begins with. ready: the step that has made the bundle."""

    name: str
    bundle: Path
    ready: Step


class Pretrainings:
    """Pre-trains, hands over and tunes, once: seeds are for the claims about translation. A claim is of one round."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.settings = desk, desk.study.pretraining
        self.data = desk.folder / "data"

    def three_ways(self, task: TaskName, given: Round) -> Claim:
        """The same tuning from BART's, CMLM's and JANUS's pre-training, and from none."""
        metric, second = TASKS[task].split(",")[:2]
        columns = [(way, name) for way in WAYS for name in (metric, second, "repetition")]
        updates = f"{given.pretraining} + {given.continued} + {given.tuning}"
        rows, losses, scores = [], {}, {}
        for name in (NOTHING, *THREE):
            tuned = self._tune(task, "nar", self._continued(name, given) if name in THREE else self._random(), given)
            written = self._write(tuned, task, WAYS)
            losses[name], scores[name] = ValidLoss(tuned), Score(written["NAR, 0 iterations"], metric)
            values: list[Value | int | str] = [updates if name in THREE else given.tuning, losses[name]]
            values += [Score(written[way], column) for way, column in columns]
            rows.append(Row(f"pre-trained: {name}", values, [PAPER[task].get(name, "-")]))
        comparisons = []
        for better, worse in (("JANUS", "CMLM"), ("CMLM", "BART"), ("JANUS", "BART")):
            name = f"{task}-{given.tuning}-{better}-{worse}".lower()
            label, paper = f"{better} > {worse}, ROUGE-L", f"{PAPER[task][better]}, {PAPER[task][worse]}"
            comparisons.append(self._compare(name, label, updates, scores[better], scores[worse], paper))
            comparisons.append(_lower(f"{better} < {worse}", updates, losses[better], losses[worse]))
        return Claim(
            f"Pre-training with JANUS helps all-at-once tuning more than with CMLM, and that more than BART ({task})",
            "JANUS, Table 7" if task == "squad_qg" else "JANUS, Table 8 (XSum)",
            "Wikipedia and books. BART from random weights, continued three ways with the same text and updates as the "
            "paper does, then runner `nar`. Updates: BART + continued + tuning.",
            ["", "updates", "validation loss", *(f"{name}, {way}" for way, name in columns), "paper: ROUGE-L"],
            rows,
            comparisons,
        )

    def exits(self, task: TaskName, given: Round) -> Claim:
        """Soft against hard exits, each with ELMER's pre-training and without."""
        metric, second = TASKS[task].split(",")[:2]
        updates = f"{given.pretraining} + {given.tuning}"
        rows, losses, scores = [], {}, {}
        for exit_, how in EXITS.items():
            for trained, start in ((True, self._pretrained("lplm", given)), (False, self._random())):
                tuned = self._tune(task, exit_.replace(" ", "_"), start, given)
                written = self._write(tuned, task, {exit_: how})[exit_]
                losses[exit_, trained], scores[exit_, trained] = ValidLoss(tuned), Score(written, metric)
                values = [Score(written, name) for name in (metric, second, "repetition")]
                label = f"{exit_}, {'ELMER' if trained else 'no pre-training'}"
                rows.append(
                    Row(
                        label,
                        [updates if trained else given.tuning, losses[exit_, trained], *values],
                        [ELMER[exit_, trained]],
                    )
                )
        comparisons = []
        for label, better, worse in EXIT_CLAIMS:
            name = "-".join([task, str(given.tuning), *re.findall(r"\w+", label)])
            paper = f"{ELMER[better]} > {ELMER[worse]}"
            comparisons.append(
                self._compare(name, f"{label}, ROUGE-L", updates, scores[better], scores[worse], paper)
            )  # fmt: skip
            if better[0] == worse[0]:  # the losses of hard and soft exits are sums over different rows
                comparisons.append(_lower(label, updates, losses[better], losses[worse]))
        return Claim(
            f"Soft exits write better than hard ones, and pre-training helps both ({task})",
            "ELMER, Table 3 (XSum)",
            "Pre-training with LPLM on the same text; tuned with each kind of exit. Hard exit at 0.5.",
            ["", "updates", "validation loss", metric, second, "repetition", "paper: ROUGE-L"],
            rows,
            comparisons,
        )

    def _compare(self, name: str, label: str, updates: str, better: Score, worse: Score, paper: str) -> Comparison:
        test = self.desk.compare(name, better.written, worse.written, better.metric)
        return Comparison(f"{label} ({updates})", better, worse, paper, test, better.metric)

    def _tune(self, task: TaskName, runner: str, start: Start, given: Round) -> Tuned:
        tuning, study = self.desk.study.tuning, self.desk.study
        data = f"{study.data}/{'squad_qg' if task == 'squad_qg' else 'wikipedia_en'}"
        own = tuning.tasks[task]
        overrides = [f"bundle={start.bundle}", f"task.path={data}", *tuning.overrides, *own.overrides]
        overrides += own.exits if runner in ("hard_exit", "soft_exit") else []
        name = f"{task}-{runner}-{start.name}".replace("_", "-")
        return self.desk.tune(name, f"{task}/{runner}", given.tuning, overrides, [start.ready])

    def _write(self, tuned: Tuned, task: TaskName, ways: Mapping[str, tuple[str, ...]]) -> dict[str, Written]:
        return {way: self.desk.write(tuned, way, how, f"{TASKS[task]},{ALWAYS}") for way, how in ways.items()}

    def _random(self) -> Start:
        """A bundle of random weights with the tokenizer and the shape of the pre-trained ones."""
        bundle = self.desk.folder / "bundles" / "random"
        data = (f"task.path={self.desk.study.data}/squad_qg", "task.without_train=true")
        command = (PYTHON, "-m", "finetune", "begin", "configs/finetune/squad_qg/nar.yaml", *data)
        rest = ("--model", self.desk.study.model, "--tokenizer", f"{self.data}/tokenizer.json", "--out", str(bundle))
        return Start("random", bundle, Step("begin/random", (*command, *rest), (self._prepared(),)))

    def _pretrained(self, objective: str, given: Round) -> Start:
        """From random weights; a later round goes on with the run."""
        earlier = [one for one in self.desk.study.rounds if one.pretraining < given.pretraining]
        needs = [self._prepared(), *([self._pretrained(objective, earlier[-1]).ready] if earlier else [])]
        return self._train(f"pretrain-{objective}", [objective], given.pretraining, needs)

    def _continued(self, name: str, given: Round) -> Start:
        """From the BART of the same round."""
        bart = self._pretrained("denoise", given)
        objective, *options = THREE[name]
        rest = [objective, *options, f"init_from={bart.bundle}", *self.settings.continued]
        return self._train(f"continue-{objective}-{given.pretraining}", rest, given.continued, [bart.ready])

    def _train(self, name: str, objective: Sequence[str], updates: int, needs: Sequence[Step]) -> Start:
        """objective: its name and overrides."""
        bundle = self.desk.folder / "bundles" / f"{name}-{updates}"
        overrides = [f"name={name}", f"runs={self.desk.folder}/runs", f"data.path={self.data}"]
        overrides += [
            f"objective.name={objective[0]}",
            *self.settings.overrides,
            *objective[1:],
            f"train.steps={updates}",
        ]
        command = (PYTHON, "-m", "pretrain", "train", self.settings.config, *overrides)
        trained = Step(f"train/{name}-{updates}", command, tuple(needs))
        handoff = (PYTHON, "-m", "pretrain", "handoff", str(self.desk.run(name)), "--out", str(bundle))
        return Start(
            f"{name.removeprefix('pretrain-')}-{updates}",
            bundle,
            Step(f"handoff/{name}-{updates}", handoff, (trained,)),
        )

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


def _lower(label: str, updates: str, better: ValidLoss, worse: ValidLoss) -> Comparison:
    return Comparison(f"{label}, validation loss ({updates})", better, worse, "-", smaller=True)

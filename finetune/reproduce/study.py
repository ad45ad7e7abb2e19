"""What a study trains and for how long: one YAML, and the steps that every part of it is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from finetune.reproduce.step import PYTHON, Step
from pretrain.config import Section

# How a bundle writes: the name of a way -> mode and options of `generate`.
AR = {"AR, beam 5": ("ar", "--beam", "5")}
NAR = {f"NAR, {k} iterations": ("nar", "--iterations", str(k), "--length-beam", "3") for k in (0, 1, 4, 10)}
TaskName = Literal["squad_qg", "wiki_first_sentence"]


class Round(Section):
    """Updates of each part. A later round goes on from the earlier one, so it has more of them.

    pretraining: of BART and of ELMER, from random weights. continued: of BART, CMLM and JANUS from that BART.
    """

    translation: int = Field(ge=1)
    pretraining: int = Field(ge=1)
    continued: int = Field(ge=1)
    tuning: int = Field(ge=1)


class Translation(Section):
    """Multi30k from random weights. overrides: of every training."""

    vocabulary: int = Field(ge=300)
    overrides: list[str] = []


class Pretraining(Section):
    """Wikipedia and books. config: YAML of `pretrain train`. max_length: tokens of a text. overrides: of each training.

    continued: overrides of what begins with the weights of BART.
    """

    config: str
    vocabulary: int = Field(ge=300)
    max_length: int = Field(ge=8)
    workers: int = Field(1, ge=1)
    overrides: list[str] = []
    continued: list[str] = []


class TaskTuning(Section):
    """overrides: of a task. exits: of its runners with exits alone."""

    overrides: list[str] = []
    exits: list[str] = []


class Tuning(Section):
    """Of pre-trained bundles. overrides: of every task and runner. tasks: what is tuned for, by folder of configs."""

    overrides: list[str] = []
    tasks: dict[TaskName, TaskTuning] = Field(min_length=1)


class Study(Section):
    """Everything `reproduce` needs.

    folder: all work lies below it. data: holds multi30k/, squad_qg/, wikipedia_en/ and books/. model: YAML of the shape
    for `begin`; pre-training has the same. seeds: of the claims about translation, one of each system after the other.
    jobs: steps at once, each with its share of the cores. rounds: each is done for every row before the next begins.
    latency: arguments of `kernels/bench/writing.py`.
    """

    folder: str = "runs/reproduce"
    data: str = "data"
    model: str
    seeds: list[int] = Field([1], min_length=1)
    jobs: int = Field(1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: list[Round] = Field(min_length=1)
    translation: Translation
    pretraining: Pretraining
    tuning: Tuning
    latency: list[str] = []


@dataclass(frozen=True)
class Tuned:
    """A tuned bundle. updates: that it has had. kept: the step that put it by."""

    name: str
    updates: int
    run: Path
    bundle: Path
    kept: Step


@dataclass(frozen=True)
class Written:
    """Texts and their scores. texts: one a line. scored: the step whose output is the JSON of the scores."""

    texts: Path
    references: Path
    wrote: Step
    scored: Step


@dataclass(frozen=True)
class Desk:
    """Makes steps below the folder of a study."""

    study: Study

    @property
    def folder(self) -> Path:
        return Path(self.study.folder)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def tune(self, name: str, config: str, updates: int, overrides: Sequence[str], needs: Sequence[Step] = ()) -> Tuned:
        """Trains run `name` until `updates`, and puts the bundle of then by, because a later round goes on with it."""
        run, bundle = self.run(name), self.folder / "bundles" / f"{name}-{updates}"
        trained = Step(
            f"train/{name}-{updates}",
            (PYTHON, "-m", "finetune", "train", f"configs/finetune/{config}.yaml", f"name={name}",
             f"runs={self.folder}/runs", *overrides, f"train.steps={updates}"),
            tuple(needs),
        )  # fmt: skip
        kept = Step(f"keep/{name}-{updates}", ("cp", "-rT", f"{run}/bundle", str(bundle)), (trained,))
        return Tuned(name, updates, run, bundle, kept)

    def write(self, tuned: Tuned, way: str, how: Sequence[str], metrics: str) -> Written:
        """Writes the test set and scores the texts."""
        stem = f"{tuned.name}-{tuned.updates}/{way.replace(', ', '-').replace(' ', '-')}"
        texts, scores = self.folder / "texts" / f"{stem}.txt", self.folder / "scores" / f"{stem}.json"
        mode, *options = how
        test = tuned.run / "task"
        wrote = Step(
            f"write/{stem}",
            (PYTHON, "-m", "finetune", "generate", str(tuned.bundle), "--mode", mode, *options, "--device",
             self.study.device, "--input", f"{test}/test.source", "--output", str(texts)),
            (tuned.kept,),
        )  # fmt: skip
        scored = Step(f"score/{stem}", _score(metrics, texts, test / "test.target"), (wrote,), scores)
        return Written(texts, test / "test.target", wrote, scored)

    def compare(self, name: str, better: Written, worse: Written, metric: str) -> Step:
        """The paired bootstrap of a difference."""
        return Step(
            f"compare/{name}",
            (*_score(metric, better.texts, better.references), "--against", str(worse.texts)),
            (better.wrote, worse.wrote),
            self.folder / "compare" / f"{name}.json",
        )


def _score(metrics: str, texts: Path, references: Path) -> tuple[str, ...]:
    files = ("--hyp", str(texts), "--ref", str(references))
    return (PYTHON, "-m", "finetune", "score", "--metrics", metrics, *files, "--json")

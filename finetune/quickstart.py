"""`make quickstart`: text -> tokenizer -> pre-training on two CPU ranks -> hand-off -> fine-tuned AR and NAR -> scores.

Every step is a command that a person could type; it is printed before it runs. The table at the end is read back
from what the steps left on disk. Started again, finished steps are continued or skipped, as the commands do.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import DataError

TASK = "stdlib-summaries"


@dataclass(frozen=True)
class Story:
    """What is pre-trained, and in which ways it then learns to write.

    objective: overrides of the configuration. ways: {line of the table: (runner, options of its decoder)}.
    """

    objective: tuple[str, ...]
    ways: Mapping[str, tuple[str, Mapping[str, Any]]]

    @property
    def runners(self) -> list[str]:
        return list(dict.fromkeys(runner for runner, _ in self.ways.values()))


BOTH_WAYS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "AR, beam 4": ("ar", {"beam": 4}),
    "NAR, 1 pass": ("nar", {"iterations": 0}),
    "NAR, 5 passes": ("nar", {"iterations": 4}),
}
EXITS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "all layers": ("hard_exit", {"threshold": 0.0}),
    "hard exit at 0.5": ("hard_exit", {"threshold": 0.5}),
    "soft exit": ("soft_exit", {}),
}
# Of ELMER two permutations a step: the paper's ten are for machines with GPUs.
STORIES = {
    **{name: Story((f"objective.name={name}",), BOTH_WAYS) for name in ("janus", "cmlm", "denoise")},
    "elmer": Story(("objective.name=lplm", "objective.copies=2"), EXITS),
}


@dataclass(frozen=True)
class Quickstart:
    """Where it works and how long it trains. objective: a name in `STORIES`."""

    folder: Path
    objective: str
    steps: int | None
    tune_steps: int | None
    sentences: int

    @property
    def story(self) -> Story:
        return STORIES[self.objective]

    @property
    def run(self) -> str:
        return f"quickstart-{self.objective}"

    def data(self) -> None:
        """Shards and tokenizer from the documentation that ships with Python."""
        python(
            "-m", "pretrain", "prepare", "--out", f"{self.folder}/data", "--source", "stdlib-docs",
            "--train-tokenizer", "8192", "--max-length", "128",
        )  # fmt: skip

    def pretrain(self) -> None:
        """Two ranks, ZeRO-2."""
        overrides = [f"name={self.run}", f"runs={self.folder}/runs", f"data.path={self.folder}/data"]
        overrides += [*self.story.objective, *(f"train.steps={n}" for n in [self.steps] if n)]
        launch = ["deepspeed", "--num_gpus", "2", "--module", "pretrain", "train", "configs/pretrain/quickstart.yaml"]
        command(*launch, *overrides)

    def handoff(self) -> None:
        """The bundle that fine-tuning starts from. If training went on, what was tuned from the old one begins anew."""
        run, last = self.folder / "runs" / self.run, self._step(self.bundle)
        fresh = self.bundle.with_name(f"{self.run}.fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        python("-m", "pretrain", "handoff", str(run), "--out", str(fresh))
        if self._step(fresh) == last:
            shutil.rmtree(fresh)
            return
        for old in (self.bundle, *(self.folder / "runs" / self.tuned(runner) for runner in self.story.runners)):
            shutil.rmtree(old, ignore_errors=True)
        fresh.rename(self.bundle)

    @staticmethod
    def _step(bundle: Path) -> int | None:
        """Update of pre-training that a bundle was made at; None where there is no bundle."""
        file = bundle / "provenance.json"
        return int(json.loads(file.read_text(encoding="utf-8"))["step"]) if file.exists() else None

    def finetune(self, runner: str) -> None:
        """Docstring without its first line -> its first line."""
        overrides = [f"name={self.tuned(runner)}", f"runs={self.folder}/runs", f"bundle={self.bundle}"]
        overrides += [f"train.steps={n}" for n in [self.tune_steps] if n]
        python("-m", "finetune", "train", f"configs/finetune/stdlib_summaries/{runner}.yaml", *overrides)

    @property
    def bundle(self) -> Path:
        return self.folder / "bundles" / self.run

    def tuned(self, runner: str) -> str:
        return f"{self.run}-{runner}"

    def table(self) -> list[str]:
        """Losses, then quality and latency of each way to write."""
        runs = self.folder / "runs"
        lines = [f"{'loss':38}{'first':>8}{'last':>8}"]
        for name in (self.run, *map(self.tuned, self.story.runners)):
            for term, first, last in losses(runs / name / "tb"):
                lines.append(f"{name + ' ' + term:38}{first:8.2f}{last:8.2f}")
        lines += ["", f"{'test set of ' + TASK:24}{'ROUGE-1':>9}{'ROUGE-L':>9}{'ms a sentence':>15}{'passes':>9}"]
        return [*lines, *(self._written(way) for way in self.story.ways)]

    def _written(self, way: str) -> str:
        """Writes the test sources one by one, as the papers time it, and scores the texts."""
        from finetune import tasks
        from finetune.scores import score
        from finetune.tasks.pairs import read_lines
        from finetune.write_file import generate

        mode, options = self.story.ways[way]
        run = self.folder / "runs" / self.tuned(mode)
        source, target, texts = (run / "task" / f"test.{kind}" for kind in ("source", "target", way.replace(" ", "-")))
        few = {}
        for path in (source, target):
            few[path] = path.with_name(f"{path.name}.{self.sentences}")
            few[path].write_text("".join(f"{line}\n" for line in read_lines(path)[: self.sentences]), encoding="utf-8")
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
        say(f"python -m finetune generate {run}/bundle --mode {mode} {flags} --batch-tokens 1 "
            f"--input {few[source]} --output {texts}")  # fmt: skip
        files = str(few[source]), str(texts)
        written = generate(str(run / "bundle"), mode, *files, options, batch_tokens=1, restart=True)
        metrics = tasks.build({"name": TASK}).metrics
        scores = score(read_lines(texts), read_lines(few[target]), metrics).values
        passes = sum(count * batches for count, batches in written.passes.items()) / written.passes.total()
        latency = 1000 * written.seconds / written.sentences
        return f"{way:24}{scores['rouge1']:9.2f}{scores['rougeL']:9.2f}{latency:15.1f}{passes:9.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every step; stops with the exit code of the first that fails."""
    parser = argparse.ArgumentParser(prog="python -m finetune.quickstart", description=__doc__)
    parser.add_argument("--objective", default="janus", choices=tuple(STORIES))
    parser.add_argument("--steps", type=int, help="updates of pre-training; default: the configuration's")
    parser.add_argument("--tune-steps", type=int, help="updates of each fine-tuning; default: the configurations'")
    parser.add_argument("--sentences", type=int, default=100, help="test sentences to write, one at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="everything is written below it")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    work = Quickstart(given.folder, given.objective, given.steps, given.tune_steps, given.sentences)
    try:
        work.data()
        work.pretrain()
        work.handoff()
        for runner in work.story.runners:
            work.finetune(runner)
    except subprocess.CalledProcessError as error:
        return error.returncode
    table = work.table()
    print("\n" + "\n".join(table))
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\n{minutes} min {seconds} s in all. Look further:")
    print(f"  tensorboard --logdir {work.folder}/runs")
    print(f"  make quickstart OBJECTIVE={work.objective} STEPS=2000        # resumes where this ended")
    base, more = ("elmer_base", "") if work.objective == "elmer" else ("janus_base", " init_from=null")
    print(f"  deepspeed --module pretrain train configs/pretrain/{base}.yaml data.path=DIR{more}   # on GPUs")
    return 0


def losses(folder: Path) -> list[tuple[str, float, float]]:
    """(term, first value, last value) of every training loss in a TensorBoard folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("loss/")]
    if not tags:
        raise DataError(f"`{folder}` must hold the losses of a run, it has none")
    curves = {tag: events.Scalars(tag) for tag in tags}
    return [(tag.removeprefix("loss/"), curve[0].value, curve[-1].value) for tag, curve in curves.items()]


def python(*arguments: str) -> None:
    """Runs this interpreter with `arguments`."""
    command(sys.executable, *arguments)


def command(program: str, *arguments: str) -> None:
    """Prints a command as a person would type it, and runs it."""
    say(" ".join(["python" if program == sys.executable else program, *arguments]))
    # Launchers are looked up beside this interpreter first: the environment need not be activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    subprocess.run([program, *arguments], check=True, env={"DS_ACCELERATOR": "cpu", **os.environ, "PATH": path})


def say(line: str) -> None:
    """One printed command."""
    print(f"\n$ {line}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

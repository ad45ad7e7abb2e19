"""`report`: reads the runs, writes what is missing, draws, and puts the page into its place last."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from finetune.charts import Panel, Plane, draw
from finetune.report import figures
from finetune.report.cards import check_card, write_cards
from finetune.report.measured import ALWAYS, measure
from finetune.report.page import PAGE, QUALITY, TRAINING, Findings, page
from finetune.report.record import read_records, same_pairs
from finetune.report.texts import write_all
from finetune.report.ways import BEAMS, ITERATIONS, ways_of
from finetune.scores import score
from finetune.writer import Writer
from pretrain.bundles.bundle import check_outside
from pretrain.errors import UsageError
from pretrain.runs import write_text

OUT, SENTENCES, SHOWN, SPLIT = "runs/report", 100, 8, "test"


def report(
    folders: Sequence[str],
    out: str = OUT,
    sentences: int = SENTENCES,
    shown: int = SHOWN,
    split: str = SPLIT,
    beams: Sequence[int] = BEAMS,
    iterations: Sequence[int] = ITERATIONS,
    device: str = "auto",
    restart: bool = False,
    metrics: Sequence[str] = (),
    cards: bool = False,
) -> Path:
    """Compares tuning runs of one task on a page with pictures in `out`, and returns the page.

    All bundles are in memory at once, because they write the same sentences in turn.

    Args:
        folders: of the runs.
        sentences: the first so many pairs are written. shown: of these are samples on the page.
        split: `test` or `valid`.
        beams, iterations: settings of --mode ar and nar.
        restart: write again what was written before.
        metrics: in place of the task's, the one for the pictures first.
        cards: put the scores into the model card of each bundle, too.

    Raises:
        UsageError: no run, a number below its smallest, or `out` is no folder or in a bundle.
        CheckpointError, ConfigError, DataError: as `read_records`; runs with different pairs; a bad bundle or card.
        Requeue: SIGTERM or SIGUSR1 came; the texts so far are kept.
    """
    target = Path(out)
    _check(folders, target, sentences, shown, beams, iterations)
    records = read_records(folders)
    pairs = same_pairs(records, split, sentences)
    names = list(dict.fromkeys([*(metrics or records[0].metrics), *ALWAYS]))
    score(["a"], ["a"], names)  # what a metric lacks is told before the hours of writing
    for record in records if cards else ():
        check_card(record)
    writers = [Writer(record.bundle, device) for record in records]
    ways = [
        way
        for record, writer in zip(records, writers, strict=True)
        for way in ways_of(record, writer, list(dict.fromkeys(beams)), list(dict.fromkeys(iterations)))
    ]
    measured = measure(ways, write_all(ways, [pair.source for pair in pairs], target, restart), pairs, names)
    pictures: dict[str, list[Panel | Plane]] = {
        QUALITY: figures.quality(measured, names[0]),
        TRAINING: figures.training(records, measured, names[0]),
    }
    drawn = [name for name, panels in pictures.items() if panels]
    for name in drawn:
        draw(pictures[name], target / name)
    given = {"out": out, "sentences": sentences, "shown": shown, "split": split, "beams": beams}
    given |= {"iterations": iterations, "device": device, "metrics": ",".join(metrics)}
    command = _command(folders, given)
    write_text(target / PAGE, page(Findings(command, records, measured, pairs, split, shown, drawn)))
    print(f"{target / PAGE}: {len(records)} run(s), {len(ways)} way(s) of writing, {len(pairs)} pairs", flush=True)
    for card in write_cards(measured, split) if cards else ():
        print(f"{card}: has the scores", flush=True)
    return target / PAGE


def _check(
    folders: Sequence[str], out: Path, sentences: int, shown: int, beams: Sequence[int], iterations: Sequence[int]
) -> None:
    if not folders:
        raise UsageError("`report` must be given at least one RUN, got none")
    least = {"sentences": (sentences, 1), "shown": (shown, 0)}
    least |= {"beams": (min(beams, default=0), 1), "iterations": (min(iterations, default=-1), 0)}
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise UsageError(f"`--{name}` must be at least {smallest}, got {value}")
    if not next(one for one in (out, *out.absolute().parents) if one.exists()).is_dir():
        raise UsageError(f"`--out` must be a folder or new, `{out}` is none")
    check_outside(out, "--out")


def _command(folders: Sequence[str], given: dict[str, object]) -> str:
    """The command line, without what is as usual."""
    usual = {"out": OUT, "sentences": SENTENCES, "shown": SHOWN, "split": SPLIT, "device": "auto"}
    usual |= {"beams": BEAMS, "iterations": ITERATIONS, "metrics": ""}
    words = ["python", "-m", "finetune", "report", *folders]
    for name, value in given.items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        if tuple(values) != (usual[name] if isinstance(usual[name], tuple) else (usual[name],)):
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)

"""`reproduce`: carries out a study until it is done or its time is over; the same command goes on."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.reproduce.claim import Claim, with_needs
from finetune.reproduce.latency import speed
from finetune.reproduce.pretrained import Pretrainings
from finetune.reproduce.results import fill, results
from finetune.reproduce.step import Queue, Step
from finetune.reproduce.study import Desk, Study
from finetune.reproduce.translation import Translations
from pretrain.checkpoints.commit import Store
from pretrain.config import load
from pretrain.errors import DataError, ParlanceError, Requeue, UsageError
from pretrain.runs import write_text

NEEDED = ("multi30k", "squad_qg", "wikipedia_en", "books")


def reproduce(
    config: str,
    overrides: Sequence[str] = (),
    hours: float | None = None,
    only: Sequence[str] = (),
    out: str = "RESULTS.md",
) -> None:
    """Runs the steps of the study in `config` that are not done, and writes RESULTS.md.

    Args:
        hours: after them nothing begins, and what runs is told to save. None: until all is done.
        only: beginnings of names of steps; what they need is done, too. Empty: all.
        out: the page; remarks around its marks stay.

    Raises:
        ConfigError: a bad study. DataError: its data are not there. UsageError: a bad number of hours, no such step.
        ParlanceError: a step failed, with the exit code of the first one.
        CheckpointError: another process works in the folder.
        Requeue: SIGTERM or SIGUSR1 came; what ran was told to save.
    """
    if hours is not None and hours <= 0:
        raise UsageError(f"`--hours` must be above 0, got {hours:g}")
    study = load(Study, config, overrides)
    _check_data(study)
    claims = list(claims_of(study))
    steps = _wanted(claims, only)
    queue = Queue(
        Path(study.folder),
        study.jobs,
        threads=os.cpu_count() or 1,
        deadline=float("inf") if hours is None else time.monotonic() + 3600 * hours,
    )
    command = " ".join(["python -m finetune reproduce", config, *overrides])
    page = Path(out)
    store = Store(queue.folder)
    store.lock()  # against a second `reproduce` in the same folder
    try:
        left = queue.run(steps)
        before = page.read_text(encoding="utf-8") if page.exists() else ""
        write_text(page, fill(before, results(claims, queue, command)))
    finally:
        store.unlock()
    print(f"{page}: {len(steps) - len(left)} of {len(steps)} steps are done", file=sys.stderr, flush=True)
    _end(queue, left)


def claims_of(study: Study) -> Iterator[Claim]:
    """Every claim, what matters most first; a round is done for all of them before the next begins."""
    desk = Desk(study)
    translations, pretrainings = Translations(desk), Pretrainings(desk)
    first, *others = study.seeds
    task, *more = study.tuning.tasks
    for given in study.rounds:
        yield translations.main(given.translation, first)
        yield translations.iterations(given.translation, first)
        yield pretrainings.three_ways(task, given)
        yield pretrainings.exits(task, given)
        if given == study.rounds[0]:
            yield speed(desk)
        yield translations.ablation(given.translation, first)
        for other in more:
            yield pretrainings.three_ways(other, given)
            yield pretrainings.exits(other, given)
    for seed in others:
        yield translations.main(study.rounds[-1].translation, seed)
        yield translations.iterations(study.rounds[-1].translation, seed)


def _wanted(claims: Sequence[Claim], only: Sequence[str]) -> list[Step]:
    every = with_needs([step for claim in claims for step in claim.steps])
    for start in only:
        if not any(step.name.startswith(start) for step in every):
            some = ", ".join(dict.fromkeys(step.name.split("/")[0] for step in every))
            raise UsageError(f"`--only` must be the beginning of the name of a step ({some}/...), got {start!r}")
    return with_needs([step for step in every if not only or step.name.startswith(tuple(only))])


def _check_data(study: Study) -> None:
    for name in NEEDED:
        if not (Path(study.data) / name).is_dir():
            raise DataError(
                f"`data` must be a folder with {', '.join(f'{one}/' for one in NEEDED)}, `{study.data}` has no {name}/"
            )


def _end(queue: Queue, left: Sequence[Step]) -> None:
    if queue.failed:
        name, code = next(iter(queue.failed.items()))
        error = ParlanceError(f"{len(queue.failed)} step(s) failed, the first is {name}: see {queue.folder}/logs")
        error.exit_code = code if code > 0 else 1
        raise error
    if queue.stopped:
        raise Requeue(f"stopped by a signal, {len(left)} steps are left: run the same command to go on")
    if left:
        print(f"the time is over, {len(left)} steps are left: run the same command to go on", file=sys.stderr)

"""`verify DIR_OR_RUN`: everything that can be wrong with a data folder, a run, a checkpoint or a bundle, by file.

    data folder   sizes and sha256 of shards and index, the tokenizer, the manifest            (data/manifest.py)
    run           every checkpoint, the pointer, whether configuration and data fit            (verify_run.py)
    checkpoint    sha256 of every file, names, shapes, finite numbers, steps and ranks          (verify_run.py)
    bundle        sha256 of every file, finite weights, tied ones once, golden logits           (here)

Every bit of shards, index, tokenizer, checkpoints and bundles is under a sha256, and every manifest under its own. What
people may touch is not: config.yaml, env.json and events.jsonl of a run must be readable and fit, boards, samples and
the README.md of a bundle are not looked at.
"""

import os
from collections.abc import Callable
from pathlib import Path

from pretrain import runs
from pretrain.bundles.bundle import CONFIG, GENERATION, GOLDEN, PROVENANCE, WEIGHTS, load_bundle
from pretrain.bundles.bundle import problems as bundle_problems
from pretrain.checkpoints.checkpoint import PROGRESS
from pretrain.data.manifest import INDEX_FILE, read_manifest, verify_folder
from pretrain.engine.state import INDEX
from pretrain.errors import CheckpointError, DataError, ParlanceError, UsageError
from pretrain.report.findings import Finding, bad, folder_bytes, good, shown_bytes
from pretrain.report.verify_run import examine_checkpoint, examine_run, tensor_problems


def verify(path: str | Path) -> None:
    """Prints a line for everything that was found at `path`.

    Raises:
        DataError: only data is bad. CheckpointError: a run, checkpoint or bundle is bad.
        UsageError: `path` is none of these.
    """
    folder = Path(path)
    kind = recognise(folder)
    print(f"{kind} {folder}", flush=True)
    findings = KINDS[kind](folder)
    for finding in findings:
        print(f"  {finding.level:4} {finding.text.replace(f'{folder}{os.sep}', '')}")
    wrong = [finding for finding in findings if finding.error]
    if wrong:
        of_data = all(finding.error is DataError for finding in wrong)
        problems = "1 problem" if len(wrong) == 1 else f"{len(wrong)} problems"
        error: type[ParlanceError] = DataError if of_data else CheckpointError
        raise error(f"{kind} `{folder}` has {problems}, the first: {wrong[0].text}")


def recognise(folder: Path) -> str:
    """Which of `KINDS` lies at `folder`, by most of its files: some may be missing.

    Raises:
        UsageError: none of them.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if any(name.endswith(".tar") for name in names):
        names.add(INDEX_FILE)
    found = {kind: len(names & typical) for kind, typical in TYPICAL.items()}
    best = max(found, key=lambda kind: found[kind])
    if not found[best]:
        raise UsageError(f"`{folder}` must be a data folder, a run, a checkpoint of a run or a bundle")
    return best


def examine_data(folder: Path) -> list[Finding]:
    """Findings about a data folder, reading all of it."""
    problems = [bad(problem, DataError) for problem in verify_folder(folder)]
    if problems:
        return problems
    manifest = read_manifest(folder)
    counted = f"{manifest.samples:,} samples, {manifest.tokens:,} tokens"
    return [good(f"{len(manifest.shards)} shards, {shown_bytes(folder_bytes(folder))}: {counted}")]


def examine_bundle(folder: Path) -> list[Finding]:
    """Findings about a bundle: its bits first, and what they mean only if they are as they were written."""
    problems = [str(folder / problem) for problem in bundle_problems(folder)]
    problems = problems or tensor_problems(folder / WEIGHTS)
    if problems:
        return [bad(problem) for problem in problems]
    try:
        bundle = load_bundle(folder)
    except CheckpointError as error:
        return [bad(str(error))]
    parameters = sum(value.numel() for value in bundle.model.parameters())
    modes = ", ".join(bundle.description.modes)
    return [
        good(f"{shown_bytes(folder_bytes(folder))}, {parameters:,} finite weights, tied ones once"),
        good(f"{folder / GOLDEN}: modes {modes}, logits computed again differ by {bundle.golden_error:.1e}"),
    ]


KINDS: dict[str, Callable[[Path], list[Finding]]] = {
    "run": examine_run,
    "checkpoint": examine_checkpoint,
    "bundle": examine_bundle,
    "data folder": examine_data,
}
# Files that only this kind has.
TYPICAL = {
    "run": {"checkpoints", "latest", runs.CONFIG, runs.EVENTS, runs.ENVIRONMENT, runs.BOARD, runs.SAMPLES},
    "checkpoint": {PROGRESS, INDEX, "state-rank0.safetensors", "rng-rank0.safetensors"},
    "bundle": {CONFIG, WEIGHTS, GOLDEN, GENERATION, PROVENANCE},
    "data folder": {INDEX_FILE},
}

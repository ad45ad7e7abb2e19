"""The part of `verify` that knows runs and their checkpoints.

A checkpoint is looked at twice: are its bits those that were committed (pretrain/checkpoints/seal.py), and, if so, do
they mean what a resume needs. The second finds what was already wrong when it was committed, or was sealed by someone
else. Tensors are read one at a time, so a checkpoint of any size needs the memory of its largest tensor.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from tqdm import tqdm

from pretrain import config as configuration
from pretrain import rng, runs
from pretrain.bundles.bundle import read_description
from pretrain.checkpoints import seal
from pretrain.checkpoints.checkpoint import PROGRESS, read_progress
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.holder import in_use
from pretrain.config import ModelConfig, RunConfig
from pretrain.data.dataset import ShardDataset
from pretrain.engine.state import FORMAT, INDEX, KEYS, UNREADABLE
from pretrain.errors import CheckpointError, ConfigError, DataError
from pretrain.loop import Progress
from pretrain.models import EncoderDecoder, SpecialIds
from pretrain.parsing import read_yaml
from pretrain.report.findings import Finding, bad, folder_bytes, good, note, shown_bytes

# {"param/model.shared.weight": shape, ...} of a whole checkpoint; None where any shape will do.
Shapes = dict[str, tuple[int, ...] | None]
FoundT = TypeVar("FoundT")
JOURNALS = (runs.CONFIG, runs.ENVIRONMENT, runs.EVENTS)


def examine_checkpoint(commit: Path) -> list[Finding]:
    """Findings about one commit; the run it lies in says what model it must fit."""
    run = commit.absolute().parent.parent
    try:
        shapes = model_shapes(read_model(run)) if (run / runs.CONFIG).exists() else None
    except (ConfigError, CheckpointError) as error:
        return [bad(str(error))]
    fits = [] if shapes else [note(f"{run / runs.CONFIG} is not there: the model was not compared")]
    return [*_examine(commit, shapes)[1], *fits]


def examine_run(run: Path) -> list[Finding]:
    """Findings about a run: its journals, every checkpoint, the pointer, and what the next start will do.

    A run that is being written now may be looked at: what it deletes meanwhile is left out.
    """
    busy, store = in_use(run), Store(run)
    commits, pointer = store.commits(), store.pointer()
    findings = [note(busy)] if busy else []
    findings += _journals(run, bool(commits))
    shapes, model = _wanted_shapes(run)
    findings += model
    sealed, sound, gone = [], [], 0
    for commit in tqdm(commits, desc="checkpoints", leave=False, disable=None):
        looked = _if_there(commit, partial(_examine, commit, shapes))
        if looked is None:
            gone += 1
            continue
        is_sealed, about = looked
        sealed += [commit] if is_sealed else []
        sound += [] if any(finding.error for finding in about) else [commit]
        findings += about
    if not busy:
        rest = [path for path in sorted(store.folder.glob("*")) if path not in commits]
        findings += [_left_over(path) for path in rest]
        sealed += [path for path in rest if _would_finish(path)]
        findings += _pointer(run, pointer, [path.name for path in commits], [path.name for path in sealed])
    if sound:
        findings += _if_there(sound[-1], partial(_edited, run, sound[-1])) or []
        findings += _if_there(sound[-1], partial(_data, run, sound[-1])) or []
    if gone and gone == len(commits):
        return [*findings, note(f"checkpoints of {run} come and go too fast to be read: verify it again later")]
    return [*findings, _outcome(len(commits) - gone, sealed, sound)]


def _examine(commit: Path, shapes: Shapes | None) -> tuple[bool, list[Finding]]:
    """(whether its bits are those that were committed, findings)"""
    broken = seal.verify(commit)
    problems = [str(commit / problem) for problem in broken] or content_problems(commit, shapes)
    return not broken, [bad(problem) for problem in problems] or [_described(commit)]


def _if_there(commit: Path, look: Callable[[], FoundT]) -> FoundT | None:
    """What `look` finds at a commit; None where retention was faster."""
    try:
        found = look()
    except (FileNotFoundError, CheckpointError):
        if commit.exists():
            raise
        return None
    return found if commit.exists() else None


def content_problems(commit: Path, shapes: Shapes | None) -> list[str]:
    """What is wrong with a commit whose bits are right; each line begins with a file. shapes: what the model needs."""
    try:
        content, index = read_progress(commit), seal.read_json(commit / INDEX)
        problems = _wrong_progress(commit, content) or _wrong_files(commit, index, content["ranks"])
        return problems or _wrong_tensors(commit, index, shapes)
    except CheckpointError as error:
        return [str(error)]
    except UNREADABLE as error:  # sealed with the right hashes and the wrong content
        return [f"{commit} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"]


def tensor_problems(path: Path, wanted: Shapes | None = None) -> list[str]:
    """What is wrong with the tensors of a safetensors file.

    wanted: {key: shape} of what it may hold; None: any tensor.
    """
    problems = []
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if wanted is not None and key not in wanted:
                    problems.append(f"{path}: `{key}` is no tensor of the model")
                    continue
                value, must = file.get_tensor(key), wanted[key] if wanted else None
                if must is not None and tuple(value.shape) != must:
                    problems.append(f"{path}: `{key}` must be {must}, is {tuple(value.shape)}")
                elif not value.is_floating_point():
                    problems.append(f"{path}: `{key}` must be floating point, is {value.dtype}")
                elif not torch.isfinite(value).all():
                    problems.append(f"{path}: `{key}` must be finite, {int((~value.isfinite()).sum())} numbers are not")
                elif key.startswith("exp_avg_sq/") and bool((value < 0).any()):
                    problems.append(f"{path}: `{key}` must not be negative")
    except UNREADABLE as error:
        problems.append(f"{path} cannot be read: {' '.join(str(error).split())}")
    return problems


def model_shapes(model: ModelConfig) -> Shapes:
    """What a checkpoint of `model` holds: weights and both moments of each parameter, tied ones once, and buffers."""
    with torch.device("meta"):  # the ids change no shape
        built = EncoderDecoder(model, SpecialIds(bos=0, pad=1, eos=2, mask=4, unk=3), backend="torch")
    parameters = {name: tuple(value.shape) for name, value in built.named_parameters()}
    tied = {name for name, _ in built.named_parameters(remove_duplicate=False)}
    shapes: Shapes = {f"{key}/model.{name}": shape for name, shape in parameters.items() for key in KEYS}
    buffers = {name: tuple(value.shape) for name, value in built.state_dict().items() if name not in tied}
    return shapes | {f"buffer/model.{name}": shape for name, shape in buffers.items()}


def read_model(run: Path) -> ModelConfig:
    """The model that the configuration of a run describes; a run that tunes a bundle has the model of that.

    Raises:
        ConfigError: config.yaml is missing or damaged. CheckpointError: the bundle is gone or damaged.
    """
    path = run / runs.CONFIG
    bundle = read_yaml(path).get("bundle")
    if isinstance(bundle, str):
        return read_description(bundle)[0].model
    model = configuration.load(RunConfig, path).model
    if model.vocab_size is None:
        raise ConfigError(f"`{path}`: `model.vocab_size` must be set in a run that has begun")
    return model


def _wanted_shapes(run: Path) -> tuple[Shapes | None, list[Finding]]:
    try:
        return model_shapes(read_model(run)), []
    except ConfigError as error:
        return None, [bad(str(error))]
    except CheckpointError as error:
        return None, [note(f"the model was not compared with {run / runs.CONFIG}: {error}")]


def _wrong_progress(commit: Path, content: Mapping[str, Any]) -> list[str]:
    step, progress = seal.number(commit.absolute().name), Progress.from_json(content["progress"])
    found = {"step": content["step"], "progress.step": progress.step}
    path, problems = commit / PROGRESS, [(key, f"{step}", was) for key, was in found.items() if was != step]
    # Samples are taken in order from the first one on, at least one an update and a token each.
    if progress.position != progress.samples:
        problems.append(("progress.position", f"{progress.samples}, the samples seen", progress.position))
    if progress.samples < progress.step:
        problems.append(("progress.samples", f"at least {progress.step}, one an update", progress.samples))
    if progress.tokens < progress.samples:
        problems.append(("progress.tokens", f"at least {progress.samples}, one a sample", progress.tokens))
    return [f"{path}: `{key}` must be {must}, is {was}" for key, must, was in problems]


def _wrong_files(commit: Path, index: Mapping[str, Any], ranks: int) -> list[str]:
    """Whether there is a file of every rank and nothing else."""
    if index["format"] != FORMAT or index["ranks"] != ranks:
        found = f"{index['format']!r:.80} and {index['ranks']!r:.80}"
        return [f"{commit / INDEX}: `format` and `ranks` must be {FORMAT} and {ranks}, are {found}"]
    step, updates = seal.number(commit.absolute().name) or 0, index.get("updates")
    if type(updates) is not int or not 0 <= updates <= step:
        return [f"{commit / INDEX}: `updates` must be from 0 to {step}, is {updates!r:.80}"]
    present = {path.name for path in commit.iterdir()}
    numbers = range(min(ranks, len(present)))  # who promises a billion ranks shall not be believed
    files = {f"{kind}-rank{rank}.safetensors" for kind in ("state", "rng") for rank in numbers}
    files |= {seal.MANIFEST, INDEX, PROGRESS}
    return [
        *(f"{commit / name} must be there, of {ranks} ranks" for name in sorted(files - present)),
        *(f"{commit / name} must not be there, of {ranks} ranks" for name in sorted(present - files)),
    ]


def _wrong_tensors(commit: Path, index: Mapping[str, Any], shapes: Shapes | None) -> list[str]:
    """Whether index, tensors and model agree, each tensor lies in one file, and every number is one."""
    path = commit / INDEX
    listed: Shapes = {f"{key}/{name}": tuple(shape) for name, shape in index["parameters"].items() for key in KEYS}
    listed |= {f"buffer/{name}": None for name in index["buffers"]}
    if shapes is not None:
        misfits = [f"{path}: the model needs `{key}`" for key in shapes if key not in listed]
        misfits += [f"{path}: the model has no `{key}`" for key in listed if key not in shapes]
        both = [(key, shapes[key], shape) for key, shape in listed.items() if key in shapes]
        both = [(key, must, shape) for key, must, shape in both if shape not in (must, None)]
        misfits += [f"{path}: `{key}` must be {must}, is {shape}" for key, must, shape in both]
        if misfits:
            return misfits
    problems, where = [], dict[str, str]()
    for rank in range(index["ranks"]):
        part = commit / f"state-rank{rank}.safetensors"
        with safe_open(part, framework="pt") as file:
            keys = list(file.keys())
        problems += [f"{part}: `{key}` is also in {where[key]}" for key in keys if key in where]
        where |= dict.fromkeys(keys, part.name)
        problems += tensor_problems(part, shapes or listed)
    problems += [problem for rank in range(index["ranks"]) if (problem := _wrong_generators(commit, rank))]
    return problems + [f"{path}: no file of a rank holds `{key}`" for key in listed if key not in where]


def _wrong_generators(commit: Path, rank: int) -> str | None:
    path = commit / f"rng-rank{rank}.safetensors"
    try:
        rng.check(path)
    except UNREADABLE as error:
        return f"{path} must hold the random generators: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _described(commit: Path) -> Finding:
    content = read_progress(commit)
    progress = Progress.from_json(content["progress"])
    return good(
        f"{commit}: {shown_bytes(folder_bytes(commit))} from {content['ranks']} rank(s), every bit as committed, "
        f"finite, {progress.tokens:,} tokens seen"
    )


def _journals(run: Path, begun: bool) -> list[Finding]:
    """What people may edit must at least be readable; a run without checkpoints may lack it."""
    findings = []
    for name in JOURNALS:
        path = run / name
        if not path.exists():
            findings.append((bad if begun else note)(f"{path} is missing"))
        elif name == runs.ENVIRONMENT:
            try:
                seal.read_json(path)
            except CheckpointError as error:
                findings.append(bad(str(error)))
        elif name == runs.EVENTS:
            findings += _broken_lines(path)
    return findings


def _broken_lines(path: Path) -> list[Finding]:
    """A kill may cut a line short; any other line must be JSON, so a broken one is told but is no fault."""
    findings = []
    try:
        lines = runs.read_journal(path.parent)
    except CheckpointError as error:
        return [bad(str(error))]
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            findings.append(note(f"{path}: line {number} is no JSON: cut short by a kill, or damaged"))
    return findings


def _would_finish(path: Path) -> bool:
    """Whether the next start takes this for a commit that lacks nothing but its name."""
    return path.name.startswith("staging-") and path.is_dir() and not path.is_symlink() and not seal.verify(path)


def _left_over(path: Path) -> Finding:
    if path.name.startswith("trash-"):
        return note(f"{path} was being deleted: the next start deletes it")
    if path.name.startswith("staging-"):
        return note(f"{path} was being saved: the next start {'finishes' if _would_finish(path) else 'deletes'} it")
    return note(f"{path} is nothing that training writes")


def _pointer(run: Path, pointer: str | None, commits: list[str], sealed: list[str]) -> list[Finding]:
    """Training reads the checkpoints, not the pointer, and corrects it; a kill between the two leaves an older one."""
    newest = max(sealed, default=None)
    if pointer == newest or newest is None:  # that nothing is intact is told by itself
        return []
    if pointer in commits:
        return [note(f"{run / 'latest'} names {pointer}, the newest intact is {newest}: the next start corrects it")]
    return [bad(f"{run / 'latest'} must name {newest}, names {pointer}: the next start corrects it")]


def _edited(run: Path, commit: Path) -> list[Finding]:
    """Whether config.yaml still says of the model, its objective and the order of the data what the checkpoint does."""
    path = run / runs.CONFIG
    try:
        values = read_yaml(path)
    except ConfigError:  # told before
        return []
    changed = runs.edited(values, read_progress(commit)["progress"].get("fixed"))
    return [
        bad(f"{path}: `{key}` must be {was!r}, as {commit.name} was trained, is {now!r}: edited by hand")
        for key, (was, now) in changed.items()
    ]


def _data(run: Path, commit: Path) -> list[Finding]:
    """Whether the data that the configuration names is that of the checkpoint, as a resume will ask."""
    try:
        data = configuration.load(RunConfig, run / runs.CONFIG).data
    except ConfigError:  # told before, or a run that has no data folder
        return []
    if not Path(data.path).is_dir():
        return [note(f"data folder `{data.path}` is not here: a resume needs it (`data.path`)")]
    try:
        dataset = ShardDataset(data.path, data.on_bad_shard)
        now = {**runs.fingerprint(dataset.manifest), "skipped": dataset.skipped_shards}
        runs.check_data(read_progress(commit)["progress"].get("data"), now, "data.path", run)
    except DataError as error:
        return [bad(str(error), DataError)]
    return [good(f"data folder `{data.path}` is that of {commit.name}; verify it by itself to read every shard")]


def _outcome(commits: int, sealed: list[Path], sound: list[Path]) -> Finding:
    """What the next start will do: it takes the newest sealed one, and stops if that is not sound."""
    if not sealed:
        return bad(f"none of {commits} checkpoints is intact") if commits else note("nothing is saved yet")
    step = max(sealed, key=lambda path: seal.number(path.name) or 0)
    if step in sound or step.name.startswith("staging-"):
        return good(f"training resumes at step {seal.number(step.name)}")
    older = f"; with {step.name} moved away, at {sound[-1].name}" if sound else ""
    return bad(f"training cannot resume at {step.name}, its content is wrong{older}")

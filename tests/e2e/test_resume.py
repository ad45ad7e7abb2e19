"""Resumes that change how a run computes, and resumes of resumes: the samples it reads and its losses stay the same.

Each life writes down the micro-batches it reads, as hashes of what is in them. Lives on several ranks are forked from a
process that has everything imported.
"""

import hashlib
import json
import multiprocessing
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.__main__ import main
from pretrain.data.stream import SampleStream, Window
from tests.pretrain.runs import ROOT, make_data, scalars, training_curve

CONFIG = """
name: {name}
runs: {runs}
data: {{path: {data}, workers: 0}}
model: {{d_model: 16, encoder_layers: 1, decoder_layers: 2, heads: 2, ffn_dim: 32, max_positions: 128,
  dropout: {dropout}, attention_dropout: {dropout}}}
objective: {objective}
batch: {{samples: 6, micro_max_tokens: 96}}
optim: {{lr: 1e-3, warmup: 2}}
engine: {{kind: local}}
train: {{steps: 1, log_every: 1, save_every: 100, keep: 1}}
"""
OBJECTIVES = ("{name: janus}", "{name: lplm, copies: 2}")
PRELOAD = [
    "torch", "deepspeed", "torch.utils.tensorboard", "pretrain.__main__", "pretrain.train",
    "pretrain.models.tensor_parallel", "tests.e2e.test_resume",
]  # fmt: skip
PATIENCE = 300.0
# (ranks, ZeRO stage or None for plain torch, ranks that share a model)
Way = tuple[int, int | None, int]
Seen = dict[int, list[str]]  # {first position of an update: what each of its samples was, in any order}


def paths() -> list[list[Way]]:
    """Twelve ways through the worlds 1, 2, 4, 2, 1; every stage stands beside every world and both degrees."""
    draw, found = random.Random(3), []
    for number in range(12):
        stages = [(number + at) % 4 for at in range(5)]
        draw.shuffle(stages)
        degrees = [min(world, 1 + (number + at) % 2) for at, world in enumerate((1, 2, 4, 2, 1))]
        found.append(list(zip((1, 2, 4, 2, 1), stages, degrees, strict=True)))
    return found


def write_config(folder: Path, data: Path, name: str, objective: str = OBJECTIVES[0], dropout: float = 0.0) -> Path:
    path = folder / f"{name}.yaml"
    given = {"name": name, "runs": folder / "runs", "data": data, "objective": objective, "dropout": dropout}
    path.write_text(CONFIG.format(**given))
    return path


def watch(record: Path) -> None:
    """From here on every window that this process trains on is added to `record`, a JSON line each."""
    windows = SampleStream.windows

    def watched(stream: SampleStream, position: int, rank: int, world: int) -> Iterator[Window]:
        source = windows(stream, position, rank, world)
        try:
            for window in source:
                with record.open("a") as file:
                    file.write(json.dumps([window.first, rank, sorted(samples(window))]) + "\n")
                yield window
        finally:
            source.close()

    SampleStream.windows = watched  # type: ignore[assignment, method-assign]


def samples(window: Window) -> Iterator[str]:
    for batch in window.batches:
        first = 0
        for index, length in enumerate(batch.n_target):
            read = [batch.source_tokens(index), batch.target_T[first : first + length].tolist()]
            yield hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]
            first += length


def seen(folder: Path) -> Seen:
    """What all records of `folder` hold; ranks that have the same part of the data must have read the same."""
    found: dict[int, dict[int, list[str]]] = {}
    for record in sorted(folder.glob("*.seen")):
        for line in record.read_text().splitlines():
            first, rank, read = json.loads(line)
            assert found.setdefault(first, {}).setdefault(rank, read) == read, "ranks that share a model read the same"
    return {first: sorted(one for read in ranks.values() for one in read) for first, ranks in sorted(found.items())}


def live(folder: Path, config: Path, way: Way, *overrides: str) -> None:
    """One life of a run on forked ranks."""
    ranks, stage, degree = way
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    path, inherited = os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), os.environ.get("PYTHONPATH")
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    engine = ["engine.kind=local"] if stage is None else ["engine.kind=deepspeed", f"engine.zero_stage={stage}"]
    words = ["train", str(config), *engine, f"engine.tensor_parallel={degree}", *overrides]
    number = len(list(folder.glob("*.seen")))
    logs = [folder / f"{number}-{rank}.log" for rank in range(ranks)]
    started = [
        context.Process(target=_rank, args=(rank, ranks, port, words, logs[rank], folder / f"{number}-{rank}.seen"))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    if inherited is not None:
        os.environ["PYTHONPATH"] = inherited
    for process in started:
        process.join(PATIENCE)
    for process in started:
        if process.is_alive():
            process.kill()
    codes = [process.exitcode for process in started]
    assert codes == [0] * ranks, (way, codes, "\n".join(log.read_text()[-2000:] for log in logs))


def _rank(rank: int, ranks: int, port: int, words: list[str], log: Path, record: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    watch(record)
    os._exit(main(words))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So few samples that an epoch ends inside nearly every third update."""
    return make_data(tmp_path_factory.mktemp("text"), 20)


def follow(folder: Path, data: Path, path: list[Way], objective: str, each: int = 2) -> None:
    """Goes along a path, `each` updates a life, and compares it with one life in plain torch."""
    folder.mkdir()
    (folder / "calm").mkdir()
    config, calm = (write_config(folder, data, name, objective) for name in ("changed", "calm"))
    for life, way in enumerate(path, start=1):
        live(folder, config, way, f"train.steps={each * life}")
    live(folder / "calm", calm, (1, None, 1), f"train.steps={each * len(path)}")
    assert seen(folder) == seen(folder / "calm"), path
    changed, same = (scalars(folder / "runs" / name) for name in ("changed", "calm"))
    for tag in [tag for tag in same if tag.startswith("loss/") or tag == "train/grad_norm"]:
        assert [step for step, _ in changed[tag]] == list(range(1, each * len(path) + 1))
        largest = max(value for _, value in same["loss/total"])
        for (step, found), (_, wanted) in zip(changed[tag], same[tag], strict=True):
            bound = 1e-5 if tag == "train/grad_norm" else 1e-6
            assert found == pytest.approx(wanted, rel=bound, abs=bound * largest), (path, tag, step)


@pytest.mark.fault("resume in another world, ZeRO stage or tensor-parallel degree")
def test_a_resume_may_change_world_stage_and_degree(data: Path, tmp_path: Path) -> None:
    follow(tmp_path / "path", data, [(1, None, 1), (2, 3, 2), (2, 2, 1)], OBJECTIVES[0])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault("resume in another world, ZeRO stage or tensor-parallel degree", trials=12)
def test_twelve_paths_through_worlds_stages_and_degrees(data: Path, tmp_path: Path) -> None:
    taken = paths()
    assert {(stage, degree) for path in taken for _, stage, degree in path} >= {
        (stage, degree) for stage in range(4) for degree in (1, 2)
    }
    for number, path in enumerate(taken):
        follow(tmp_path / str(number), data, path, OBJECTIVES[number % 2])


CHAINS = {
    "a short epoch": (OBJECTIVES[0], "batch.samples=6"),
    "a batch in tokens": (OBJECTIVES[0], "batch={tokens: 90, micro_max_tokens: 64}"),
    "early exits": (OBJECTIVES[1], "batch.samples=5"),
    "more than an epoch an update": (OBJECTIVES[0], "batch.samples=31"),
}


def chain(folder: Path, data: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten resumes in a row, each with another number of workers, against one life; with dropout, so that the
    generators have to go on, too."""
    objective, batch = CHAINS[name]
    lives: dict[str, list[tuple[int, int]]] = {
        "resumed": [(1 + life, life % 3) for life in range(11)],
        "calm": [(11, 0)],
    }
    for run, given in lives.items():
        (folder / run).mkdir(parents=True)
        config = write_config(folder / run, data, run, objective, dropout=0.1)
        for number, (steps, workers) in enumerate(given):
            with monkeypatch.context() as patch:
                patch.setattr(SampleStream, "windows", SampleStream.windows)  # to be put back after `watch`
                watch(folder / run / f"{number}.seen")
                assert main(["train", str(config), batch, f"train.steps={steps}", f"data.workers={workers}"]) == 0
    resumed, calm = seen(folder / "resumed"), seen(folder / "calm")
    assert resumed == calm and len(resumed) == 11
    curves = [training_curve(folder / run / "runs" / run) for run in lives]
    assert curves[0] == curves[1], "to the bit"


@pytest.mark.fault("resume ten times in a row", trials=10)
def test_ten_resumes_in_a_row_read_the_same_and_compute_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(tmp_path, data, "a short epoch", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHAINS if name != "a short epoch"])
@pytest.mark.fault("resume ten times in a row", trials=10)
def test_other_ten_resumes_in_a_row(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain(tmp_path, data, name, monkeypatch)

"""What may take the place of a bundle, and what is left where several processes write one at the same time."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from pretrain.__main__ import main
from pretrain.bundles.bundle import load_bundle
from pretrain.bundles.origin import other_origin
from pretrain.bundles.whole_folder import whole_folder
from pretrain.checkpoints import seal
from tests.pretrain.runs import make_data, write_config

FILES = 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    assert main(["train", str(write_config(place, make_data(place, 60))), "train.steps=2"]) == 0
    return place


def train(whole: Path, *overrides: str) -> Path:
    assert main(["train", str(write_config(whole, whole / "data")), "train.steps=2", *overrides]) == 0
    return whole / "runs" / "tiny"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_later_step_of_the_run_takes_the_place_of_its_bundle(whole: Path, tmp_path: Path) -> None:
    run, out = whole / "runs" / "tiny", tmp_path / "bundle"
    for step in (2, 3):
        train(whole, f"train.steps={step}")
        assert main(["handoff", str(run), "--out", str(out)]) == 0
        assert load_bundle(out).provenance["step"] == step
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("name=other",), "a bundle of run `other`, it is one of run `tiny`: "),
        (("runs={tmp}/runs", "seed=7"), "it is one of run `tiny` with another `seed`"),
        (("runs={tmp}/runs", "objective.name=denoise"), "it is one of run `tiny` with another `objective.name`"),
    ],
)
def test_a_bundle_of_another_run_stays(
    overrides: tuple[str, ...], told: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert main(["handoff", str(train(whole)), "--out", str(out)]) == 0
    before = (out / "manifest.json").read_bytes()
    given = [override.format(tmp=tmp_path) for override in overrides]
    train(whole, *given)
    run = tmp_path / "runs" / "tiny" if "runs=" in given[0] else whole / "runs" / "other"
    capsys.readouterr()
    assert main(["handoff", str(run), "--out", str(out)]) == 5
    err = capsys.readouterr().err
    assert told in err and "name another folder, or delete it" in err and err.count("\n") == 1
    assert (out / "manifest.json").read_bytes() == before
    shutil.rmtree(out)
    assert main(["handoff", str(run), "--out", str(out)]) == 0


def test_origins() -> None:
    bart = {"imported_from": "facebook/bart-base", "files": {"model.safetensors": "a"}}
    assert other_origin(bart, {**bart, "files": {"model.safetensors": "b"}}) is None, "published anew"
    assert other_origin(bart, {**bart, "imported_from": "here"}) is None, "the same files"
    assert other_origin(bart, {"imported_from": "here", "files": {}}) == ""
    run = {"run": "a", "step": 1, "config": {"seed": 1, "objective": {"name": "janus"}}, "data": {"index_sha256": "x"}}
    assert other_origin(run, bart) == other_origin(bart, run) == other_origin({}, run) == ""
    assert other_origin(run, {**run, "tuned_from": {}}) == "", "tuned from it, but not it"
    assert other_origin({**run, "data": {"index_sha256": "y"}}, run) == " with another `data.index_sha256`"
    newer = {**run, "config": {"seed": 1, "objective": {"name": "janus", "new": 1}}}
    assert other_origin(run, newer) is None, "an option that did not exist then"


def write(target: Path, mark: str, pause: float) -> None:
    with whole_folder(target, lambda: None) as folder:
        for number in range(FILES):
            (folder / f"{number}.txt").write_text(mark)
            time.sleep(pause)
        seal.seal_folder(folder, step=0)


def start(target: Path, mark: str, pause: float = 0.002) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=write, args=(target, mark, pause))
    process.start()
    return process


def test_several_processes_that_write_one_folder_never_mix(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    jobs = [start(target, mark) for mark in "abcdef"]
    while any(job.is_alive() for job in jobs):
        time.sleep(0.001)
    assert [job.exitcode for job in jobs] == [0] * len(jobs)
    assert not seal.verify(target, step_in_name=False)
    assert len({(target / f"{number}.txt").read_text() for number in range(FILES)}) == 1
    assert names(tmp_path) == ["bundle"]


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    dead, alive = start(target, "dead", 10), start(target, "alive", 10)
    while len(list(tmp_path.glob(".bundle.staging-*/0.txt"))) < 2:
        time.sleep(0.001)
    assert dead.pid is not None
    os.kill(dead.pid, signal.SIGKILL)
    dead.join()
    (tmp_path / ".bundle.trash-00000000").mkdir()
    write(target, "new", 0)
    left = [path for path in tmp_path.iterdir() if path != target]
    assert [(path / "0.txt").read_text() for path in left] == ["alive"]
    alive.kill()
    alive.join()


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def check() -> None:
        if target.exists():
            raise ValueError("taken")

    with pytest.raises(ValueError, match="taken"), whole_folder(target, check) as folder:
        (folder / "a").write_text("ours")
        target.mkdir()
        (target / "a").write_text(json.dumps("theirs"))
    assert names(tmp_path) == ["bundle"] and "theirs" in (target / "a").read_text()

"""The board of whole runs: a kill leaves every (tag, step) once, and the cosine changes nothing that is trained."""

import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from pretrain import run as module
from pretrain.__main__ import main
from tests.pretrain.runs import make_data, training_curve, write_config

WATCHED = ("train.steps=8", "train.save_every=4", "train.validate_every=2", "train.sample_every=2")
COSINE = "train/cosine_ar_nar"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"), 60)


def train(place: Path, data: Path, *changes: str) -> Path:
    place.mkdir(exist_ok=True)
    assert main(["train", str(write_config(place, data)), *WATCHED, "model.dropout=0.1", *changes]) == 0
    return place / "runs" / "tiny"


@pytest.fixture(scope="module")
def watched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("watched"), data, "train.cosine_every=2")


def board(run: Path) -> EventAccumulator:
    """What TensorBoard serves; it keeps everything as tensors."""
    return EventAccumulator(str(run / "tb"), tensor_size_guidance={"images": 100, "text": 100}).Reload()


def texts(run: Path) -> dict[str, list[tuple[int, bytes]]]:
    """{tag: [(step, markdown)]} of what the model wrote."""
    found = board(run)
    tags = [tag for tag in found.Tags()["tensors"] if tag.startswith("samples/")]
    return {tag: [(e.step, e.tensor_proto.string_val[0]) for e in found.Tensors(tag)] for tag in tags}


def state(run: Path) -> bytes:
    return (run / "checkpoints" / "step-00000008" / "state-rank0.safetensors").read_bytes()


def test_training_with_the_cosine_is_the_training_without(data: Path, watched: Path, tmp_path: Path) -> None:
    alone = train(tmp_path, data)
    curve = training_curve(watched)
    assert [step for step, _ in curve[COSINE]] == [2, 4, 6, 8] and all(-1 <= value <= 1 for _, value in curve[COSINE])
    assert {tag: curve[tag] for tag in curve if tag != COSINE} == training_curve(alone)
    assert state(watched) == state(alone) and texts(watched) == texts(alone)


def test_a_killed_life_is_painted_over(
    data: Path, watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(self: Any, report: Any) -> None:
        if report.step == 7:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(module.Skips, "after_step", kill)
        with pytest.raises(Killed):
            train(tmp_path, data, "train.cosine_every=2")
    time.sleep(1.1)  # readers order event files by name, and names tell seconds
    run = train(tmp_path, data, "train.cosine_every=2")
    assert len(list((run / "tb").iterdir())) == 2, "one file a life"
    curve, whole = training_curve(run), training_curve(watched)
    assert curve == whole and [step for step, _ in curve["loss/total"]] == list(range(1, 9))
    assert texts(run) == texts(watched) and [step for step, _ in texts(run)["samples/nar/text_summary"]] == [2, 4, 6, 8]
    assert state(run) == state(watched)
    assert [event.step for event in board(run).Tensors("masks/decoder")] == [0, 4], "one picture a life"


def test_groups_and_hparams(watched: Path) -> None:
    tags = board(watched).Tags()
    texts = {"samples/ar/text_summary", "samples/nar/text_summary", "samples/aux/text_summary", "config/text_summary"}
    assert texts <= set(tags["tensors"])
    cards = [tag for tag in tags["tensors"] if tag not in texts and not tag.startswith("_hparams_")]
    groups = sorted({tag.partition("/")[0] for tag in cards})
    assert groups[0] == "loss", "what people look for comes first, boards sort by name"
    assert groups == ["loss", "masks", "memory", "speed", "train", "valid", "watched"]
    content = board(watched).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert given["optim.lr"].number_value == 0.01 and given["objective.name"].string_value == "janus"
    assert not {"name", "runs"} & set(given), "they differ in all runs and change nothing"

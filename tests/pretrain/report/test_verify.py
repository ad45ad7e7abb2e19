"""`verify`: what is wrong though every hash is right, what a start would do, and the exit codes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pretrain.__main__ import main
from pretrain.checkpoints import seal
from pretrain.checkpoints.commit import Store
from pretrain.errors import UsageError
from pretrain.report.findings import Finding, shown_bytes
from pretrain.report.verify import KINDS, recognise
from tests.pretrain.runs import make_data, reseal, start, wait_for_save, write_config, write_text

STATE, RNG = "state-rank0.safetensors", "rng-rank0.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    assert main(["train", str(write_config(place, make_data(place, 60))), "train.steps=2", "train.save_every=1"]) == 0
    assert main(["handoff", str(place / "runs" / "tiny"), "--out", str(place / "bundle")]) == 0
    return place


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole / "runs" / "tiny", tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000002"


def examine(folder: Path) -> list[Finding]:
    return KINDS[recognise(folder)](folder)


def texts(folder: Path, level: str) -> list[str]:
    return [finding.text for finding in examine(folder) if finding.level == level]


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    values = load_file(path)
    change(values)
    save_file(values, path)


def edit_generators(
    path: Path, change: Callable[[dict[str, torch.Tensor]], object], rest: dict[str, object] | None = None
) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    values = load_file(path)
    change(values)
    save_file(values, path, {"rest": json.dumps(rest)} if rest else metadata)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def put(key: str, place: tuple[int, ...], value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(values: dict[str, torch.Tensor]) -> None:
        values[key][place] = value

    return change


def narrow(values: dict[str, torch.Tensor]) -> None:
    values["param/model.length_head.weight"] = values["param/model.length_head.weight"][:, :-1].contiguous()


def tie(values: dict[str, torch.Tensor]) -> None:
    values["param/model.head.weight"] = values["param/model.shared.weight"].clone()


def second_rank(commit: Path) -> None:
    """A rank that wrote one tensor of the first rank again."""
    for name in ("state.json", "progress.json"):
        edit_json(commit / name, lambda values: values.update(ranks=2))
    shutil.copy(commit / RNG, commit / "rng-rank1.safetensors")
    weight = load_file(commit / STATE)["param/model.shared.weight"]
    save_file({"param/model.shared.weight": weight}, commit / "state-rank1.safetensors")


# What was done to a commit before it was sealed anew, and what must be said of it.
CONTENT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a generator that is short": (
        lambda c: edit_generators(c / RNG, lambda v: v.update(numpy=v["numpy"][:-1].clone())),
        f"{RNG} must hold the random generators: ValueError: numpy's generator must have 624 words of "
        "torch.int64, has [623] of torch.int64",
    ),
    "a generator of another kind": (
        lambda c: edit_generators(c / RNG, lambda v: v.update(python=v["python"].double())),
        "python's generator must have 625 words of torch.int64, has [625] of torch.float64",
    ),
    "a generator with words beyond 32 bits": (
        lambda c: edit_generators(c / RNG, lambda v: v["numpy"].__setitem__(3, 1 << 40)),
        "numpy's generator must be of 32-bit words, has ",
    ),
    "torch's generator cut short": (
        lambda c: edit_generators(c / RNG, lambda v: v.update(torch=v["torch"][:100].clone())),
        f"{RNG} must hold the random generators: ",
    ),
    "a generator that stands nowhere": (
        lambda c: edit_generators(c / RNG, lambda v: None, {"numpy": [-1, 0, 0.0], "python": [3, None]}),
        "numpy's generator must have 624 words, stands at -1",
    ),
    "no generator": (
        lambda c: edit_generators(c / RNG, lambda v: v.pop("python")),
        f"{RNG} must hold the random generators: KeyError: 'python'",
    ),
    "a position that is not that of the samples": (
        lambda c: edit_json(c / "progress.json", lambda v: v["progress"].update(position=3)),
        "progress.json: `progress.position` must be 12, the samples seen, is 3",
    ),
    "fewer samples than updates": (
        lambda c: edit_json(c / "progress.json", lambda v: v["progress"].update(samples=1, position=1)),
        "progress.json: `progress.samples` must be at least 2, one an update, is 1",
    ),
    "fewer tokens than samples": (
        lambda c: edit_json(c / "progress.json", lambda v: v["progress"].update(tokens=11)),
        "progress.json: `progress.tokens` must be at least 12, one a sample, is 11",
    ),
    "a position below zero": (
        lambda c: edit_json(c / "progress.json", lambda v: v["progress"].update(position=-1)),
        "`position` must be an integer, got -1",
    ),
    "a weight that is no number": (
        lambda c: edit_tensors(c / STATE, put("param/model.shared.weight", (7, 3), float("nan"))),
        f"{STATE}: `param/model.shared.weight` must be finite, 1 numbers are not",
    ),
    "an infinite moment": (
        lambda c: edit_tensors(c / STATE, put("exp_avg/model.length_head.weight", (0, 0), float("inf"))),
        f"{STATE}: `exp_avg/model.length_head.weight` must be finite",
    ),
    "a negative square": (
        lambda c: edit_tensors(c / STATE, put("exp_avg_sq/model.shared.weight", (0, 0), -1e-9)),
        f"{STATE}: `exp_avg_sq/model.shared.weight` must not be negative",
    ),
    "a tensor that is missing": (
        lambda c: edit_tensors(c / STATE, lambda v: v.pop("exp_avg/model.shared.weight")),
        "state.json: no file of a rank holds `exp_avg/model.shared.weight`",
    ),
    "another shape": (lambda c: edit_tensors(c / STATE, narrow), "`param/model.length_head.weight` must be (256, 16)"),
    "whole numbers": (
        lambda c: edit_tensors(c / STATE, lambda v: v.update({k: x.long() for k, x in v.items()})),
        "must be floating point",
    ),
    "the tied weight twice": (lambda c: edit_tensors(c / STATE, tie), "`param/model.head.weight` is no tensor of"),
    "a tensor of two ranks": (second_rank, f"`param/model.shared.weight` is also in {STATE}"),
    "a rank too many": (
        lambda c: shutil.copy(c / STATE, c / "state-rank1.safetensors"),
        "state-rank1.safetensors must not be there",
    ),
    "a rank too few": (lambda c: (c / RNG).unlink(), f"{RNG} must be there"),
    "a billion ranks": (
        lambda c: [edit_json(c / name, lambda v: v.update(ranks=10**9)) for name in ("state.json", "progress.json")],
        "state-rank1.safetensors must be there",
    ),
    "ranks that disagree": (lambda c: edit_json(c / "state.json", lambda v: v.update(ranks=2)), "`format` and `ranks`"),
    "a parameter in name only": (
        lambda c: edit_json(c / "state.json", lambda v: v["parameters"].update({"model.extra": [1]})),
        "state.json: the model has no `param/model.extra`",
    ),
    "another step": (
        lambda c: edit_json(c / "progress.json", lambda v: v.update(step=7)),
        "progress.json: `step` must be 2, is 7",
    ),
    "another progress": (
        lambda c: edit_json(c / "progress.json", lambda v: v["progress"].update(step=1)),
        "progress.json: `progress.step` must be 2, is 1",
    ),
    "progress that is none": (
        lambda c: edit_json(c / "progress.json", lambda v: v["progress"].update(tokens="many")),
        "`tokens` must be an integer",
    ),
    "no tensors": (lambda c: (c / STATE).write_bytes(b"\x08"), "cannot be read"),
    "no index": (lambda c: (c / "state.json").write_text("[]"), "state.json"),
}


@pytest.mark.parametrize("what", CONTENT)
def test_content_that_was_wrong_when_it_was_sealed(what: str, run: Path, newest: Path) -> None:
    damage, message = CONTENT[what]
    damage(newest)
    seal.seal_folder(newest, step=2)
    assert not seal.verify(newest), "the hashes are right"
    wrong = texts(run, "BAD")
    assert any(message in text for text in wrong), wrong
    assert "with step-00000002 moved away, at step-00000001" in wrong[-1], "and a start would stop there"
    assert any(message in text for text in texts(newest, "BAD")), "the checkpoint alone"


def test_a_damaged_newest_checkpoint_means_the_one_before(run: Path, newest: Path) -> None:
    (newest / STATE).write_bytes((newest / STATE).read_bytes()[:-1])
    assert list(texts(run, "BAD")) == list(texts(newest, "BAD"))
    assert texts(run, "ok")[-1] == "training resumes at step 1"
    assert texts(run, "note") == [
        f"{run / 'latest'} names step-00000002, the newest intact is step-00000001: the next start corrects it"
    ]
    (run / "checkpoints" / "step-00000001" / STATE).unlink()
    assert texts(run, "BAD")[-1] == "none of 2 checkpoints is intact"


def test_the_answer_is_what_training_does(run: Path, newest: Path, whole: Path) -> None:
    """Whatever is done to the folder, the step that is promised is the step that is resumed."""
    (newest / "state.json").unlink()
    staging = run / "checkpoints" / "staging-00000003"
    for damage, step in ((lambda: None, 1), (lambda: make_staging(run, staging), 3)):
        damage()
        assert texts(run, "ok")[-1] == f"training resumes at step {step}"
        store = Store(run)
        store.recover()
        latest = store.latest()
        assert latest is not None and seal.number(latest.name) == step


def make_staging(run: Path, staging: Path) -> None:
    """Complete but for its name, as a kill just before the rename leaves it."""
    shutil.copytree(run / "checkpoints" / "step-00000001", staging)
    for name, change in {"progress.json": lambda v: (v.update(step=3), v["progress"].update(step=3))}.items():
        edit_json(staging / name, change)
    seal.seal_folder(staging, step=3)


def test_what_a_kill_leaves_is_told_and_is_no_fault(run: Path, newest: Path) -> None:
    shutil.copytree(newest, run / "checkpoints" / "trash-step-00000001-0")
    (run / "checkpoints" / "staging-00000003").mkdir()
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "sa')
    (run / "latest").write_text("step-00000001\n")
    assert not texts(run, "BAD")
    told = "\n".join(texts(run, "note"))
    assert "trash-step-00000001-0 was being deleted" in told and "the next start deletes it" in told
    assert "staging-00000003 was being saved" in told and "events.jsonl: line 5" in told and "latest names" in told


@pytest.mark.parametrize("content", ["step-00000009\n", "step-00000002\x00", "", None])
def test_a_pointer_to_nowhere(content: str | None, run: Path) -> None:
    (run / "latest").unlink() if content is None else (run / "latest").write_text(content)
    assert [text for text in texts(run, "BAD") if "latest must name step-00000002" in text]


@pytest.mark.parametrize("name", ["config.yaml", "env.json", "events.jsonl"])
def test_journals_must_be_there_and_readable(name: str, run: Path) -> None:
    (run / name).write_text("{")
    level = "note" if name == "events.jsonl" else "BAD"  # a line may be cut short by a kill
    assert any(name in text for text in texts(run, level))
    (run / name).unlink()
    assert any(name in text for text in texts(run, "BAD"))


def test_another_model_in_the_configuration(run: Path) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"]["decoder_layers"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert any("the model needs `param/model.decoder.layers.2" in text for text in texts(run, "BAD"))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("objective", "label_smoothing", 0.25), ("model", "activation", "relu"), ("data", "weights", {"tiny": 1.0}),
     (None, "seed", 5)],
)  # fmt: skip
def test_a_configuration_that_was_edited_by_hand(
    section: str | None, key: str, value: object, run: Path, newest: Path, whole: Path, capsys
) -> None:
    path, given = run / "config.yaml", whole / "tiny.yaml"
    values = yaml.safe_load(path.read_text())
    part = values[section] if section else values
    name, was = f"{section}.{key}" if section else key, part[key]
    part[key] = value
    path.write_text(yaml.safe_dump(values))
    expected = f"config.yaml: `{name}` must be {was!r}, as step-00000002 was trained, is {value!r}: edited by hand"
    assert any(expected in text for text in texts(run, "BAD")), texts(run, "BAD")
    capsys.readouterr()
    assert main(["handoff", str(run), "--out", str(run.parent / "new")]) == 5
    assert f"`{name}` must be {was!r}" in capsys.readouterr().err
    more = [f"runs={run.parent}", "train.steps=3"]
    change = f"{name}={json.dumps(value)}"
    assert main(["train", str(given), *more, change]) == 3, "the file says so, the checkpoint does not"
    told = capsys.readouterr().err
    assert (f"`{name}" in told and f"must stay {was!r}" in told) or "`data.weights.tiny` must stay None" in told, told
    assert main(["train", str(given), *more]) == 0
    assert not texts(run, "BAD"), "the file is written anew"


def test_a_checkpoint_that_keeps_nothing_of_its_configuration(run: Path, newest: Path, whole: Path) -> None:
    for commit in run.glob("checkpoints/step-*"):
        edit_json(commit / "progress.json", lambda values: values["progress"].pop("fixed"))
        reseal(commit)
    assert not texts(run, "BAD")
    assert main(["train", str(whole / "tiny.yaml"), f"runs={run.parent}", "train.steps=3"]) == 0
    assert main(["train", str(whole / "tiny.yaml"), f"runs={run.parent}", "train.steps=4", "seed=2"]) == 3


def test_other_data_and_data_that_is_elsewhere(run: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    source = f"tiny=text:{write_text(tmp_path / 'b.txt', 61)}"
    prepare = ["prepare", "--out", str(tmp_path / "other"), "--source", source, "--tokenizer", str(whole / "data")]
    assert main([*prepare, "--workers", "1"]) == 0
    values["data"]["path"] = str(tmp_path / "other")
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["verify", str(run)]) == 4
    values["data"]["path"] = "not/here"
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["verify", str(run)]) == 0
    assert any("`not/here` is not here" in text for text in texts(run, "note"))


def test_exit_codes_and_one_line(whole: Path, run: Path, newest: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(whole / "data", tmp_path / "data")
    shutil.copytree(whole / "bundle", tmp_path / "bundle")
    (tmp_path / "empty").mkdir()
    shard = next((tmp_path / "data").glob("*.tar"))
    for path, hurt, code in (
        (tmp_path / "data", shard, 4),
        (run, newest / STATE, 5),
        (newest, newest / RNG, 5),
        (tmp_path / "bundle", tmp_path / "bundle" / "golden.safetensors", 5),
    ):
        if path != newest:
            assert main(["verify", str(path)]) == 0
        capsys.readouterr()
        hurt.unlink()
        assert main(["verify", str(path)]) == code
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        assert hurt.name in captured.err
        assert re.search(rf"BAD  (shard `)?{re.escape(str(hurt.relative_to(path)))}", captured.out)
    for nothing in (tmp_path / "empty", tmp_path / "nowhere"):
        assert main(["verify", str(nothing)]) == 2


def test_a_bundle_with_a_number_missing_where_no_golden_logit_looks(whole: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(whole / "bundle", bundle)
    spread = load_file(bundle / "golden.safetensors")
    unused = next(n for n in range(10, 300) if all(n not in spread[f"in/{side}"] for side in ("source", "target")))
    # The head is tied, so the logit of that very token sees it; a position beyond the golden ones is seen by none.
    assert unused
    edit_tensors(bundle / "model.safetensors", put("decoder.embed_positions.weight", (100, 0), float("inf")))
    seal.seal_folder(bundle, step=0)
    assert texts(bundle, "BAD") == [
        f"{bundle / 'model.safetensors'}: `decoder.embed_positions.weight` must be finite, 1 numbers are not"
    ]


def test_a_bundle_that_computes_something_else(whole: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(whole / "bundle", bundle)
    edit_tensors(bundle / "model.safetensors", put("shared.weight", (20, 0), 3.0))
    seal.seal_folder(bundle, step=0)
    assert "does not compute what it was written with" in texts(bundle, "BAD")[0]


def test_a_run_that_is_being_written(whole: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, whole / "data")
    job = start("train", config, "train.steps=400", "train.save_every=1", "train.sample_every=0", "train.keep=1")
    run = tmp_path / "runs" / "tiny"
    try:
        wait_for_save(job, run)
        for _ in range(20):
            assert not texts(run, "BAD")
        assert any(f"pid {job.pid}" in text for text in texts(run, "note")) or job.poll() is not None
    finally:
        job.kill()
        job.communicate()


def test_what_is_neither_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="must be a data folder, a run, a checkpoint of a run or a bundle"):
        recognise(tmp_path)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (116_116_116, "116 MB"), (3.4e12, "3.4 TB")],
)
def test_bytes_for_people(count: float, shown: str) -> None:
    assert shown_bytes(int(count)) == shown


def test_a_staging_folder_that_is_a_link_takes_no_commits_place(run: Path, newest: Path, tmp_path: Path) -> None:
    shutil.copytree(newest, tmp_path / "elsewhere")
    (newest.parent / "staging-00000002").symlink_to(tmp_path / "elsewhere")
    assert any("the next start deletes it" in text for text in texts(run, "note"))
    store = Store(run)
    store.recover()
    assert store.latest() == newest and newest.is_dir() and not newest.is_symlink()
    assert (tmp_path / "elsewhere" / "manifest.json").exists()


@pytest.mark.parametrize("updates", [None, "x", -5, 3, 10**30])
def test_a_count_of_updates_that_cannot_be(updates: object, run: Path, newest: Path) -> None:
    edit_json(newest / "state.json", lambda values: values.update(updates=updates))
    seal.seal_folder(newest, step=2)
    assert "`updates` must be from 0 to 2" in texts(run, "BAD")[0]

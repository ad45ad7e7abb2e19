"""The command line end to end: prepare, train, killed and stopped, hand-off; and what a first user gets wrong."""

import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from pretrain.__main__ import main
from pretrain.bundles.bundle import load_bundle
from pretrain.data.manifest import read_manifest
from pretrain.objectives.janus import Janus
from pretrain.runs import read_events
from tests.pretrain.runs import (
    make_data,
    reseal,
    scalars,
    start,
    training_curve,
    wait_for_save,
    write_config,
    write_text,
)

LONG = ("train.steps=40", "train.save_every=4", "train.sample_every=0", "train.validate_every=20")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("text"), 200)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main(["train", str(write_config(folder, data)), *LONG]) == 0
    return folder / "runs" / "tiny"


def final_state(run, step):
    return (run / "checkpoints" / f"step-{step:08d}" / "state-rank0.safetensors").read_bytes()


def last_line(captured):
    lines = captured.err.strip().splitlines()
    return lines[-1]


def test_prepare_train_handoff_load(data, tmp_path, capsys):
    config = write_config(tmp_path, data)
    run = tmp_path / "runs" / "tiny"
    assert main(["train", str(config)]) == 0
    printed = capsys.readouterr().err
    assert "step 6/6 loss" in printed and "valid at step 6" in printed and "training and" in printed
    assert [e["event"] for e in read_events(run)] == ["start", "save", "save", "finish"]
    assert (run / "latest").read_text().strip() == "step-00000006"
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["vocab_size"] >= 261
    assert json.loads((run / "env.json").read_text())["ranks"] == 1
    sample = (run / "samples" / "step_000003.txt").read_text()
    assert sample.startswith("source ") and "\nar " in sample and "\nnar " in sample
    tags = scalars(run)
    for tag in ("loss/ar", "loss/nar", "loss/total", "train/lr", "train/grad_norm", "train/mask_ratio", "valid/total"):
        assert tags[tag][-1][0] == 6, tag
    assert [step for step, _ in tags["loss/total"]] == [1, 2, 3, 4, 5, 6]
    assert tags["loss/total"][-1][1] < tags["loss/total"][0][1]

    out = tmp_path / "bundle"
    assert main(["handoff", str(run), "--out", str(out)]) == 0
    assert "the length predictor is untrained" in last_line(capsys.readouterr())
    bundle = load_bundle(out)
    assert bundle.golden_error == 0.0
    assert bundle.description.max_source == min(128, read_manifest(data).plan.max_length)
    assert not bundle.description.length_trained, "its loss has weight 0 in the paper"
    assert bundle.provenance["step"] == 6 and bundle.provenance["data"]["sources"][0]["name"] == "tiny"
    assert main(["handoff", str(run), "--out", str(out)]) == 0, "an older bundle is replaced"


def test_a_finished_run_has_nothing_to_do_and_steps_may_be_raised(data, tmp_path):
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "train.steps=8", "train.log_every=2", "engine.zero_stage=1"]) == 0
    events = read_events(run)
    assert [(e["event"], e["step"]) for e in events[-3:]] == [("resume", 6), ("save", 8), ("finish", 8)]
    assert events[-3]["changed"]["train.steps"] == [6, 8]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_ended_goes_on_bit_by_bit(end, data, uninterrupted, tmp_path, capsys):
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    process = start("train", config, *LONG, "data.workers=1")
    wait_for_save(process, run)
    time.sleep(random.random() * 0.2)
    process.send_signal(end)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if end == signal.SIGKILL else 85), err
    last = read_events(run)[-1]
    if end != signal.SIGKILL:
        assert last["event"] == "stop" and "error: stopped by a signal, saved step" in err
    assert last["step"] < 40, "the run was over before the signal came"

    assert main(["train", str(config), *LONG]) == 0
    assert "continuing at step" in capsys.readouterr().err
    assert final_state(run, 40) == final_state(uninterrupted, 40)
    curve, expected = training_curve(run), training_curve(uninterrupted)
    assert curve == expected, "each (tag, step) once, each with the value of the uninterrupted run"
    assert [step for step, _ in curve["loss/total"]] == list(range(1, 41))


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("optim.lrr=1", 3, "unknown key `optim.lrr`; did you mean `optim.lr`?"),
        ("train.steps=many", 3, "`train.steps` must be a valid integer, got 'many'"),
        ("model.dropout=1.5", 3, "`model.dropout`"),
        ("objective.name=bert", 3, "`objective.name` must be one of janus"),
        ("model.vocab_size=100", 3, "`model.vocab_size` must be at least"),
        ("model.max_positions=16", 3, "`model.max_positions` must be at least"),
        ("data.weights={other: 1}", 3, "`data.weights` names an unknown source `other`; sources: tiny"),
        ("engine.backend=cuda", 3, "`engine.backend`"),
        ("data.path=nowhere", 4, "data folder `nowhere`"),
        ("nonsense", 3, "must look like key=value"),
    ],
)
def test_bad_configurations_are_one_line_and_start_nothing(override, code, message, data, tmp_path, capsys):
    config = write_config(tmp_path, data)
    capsys.readouterr()
    assert main(["train", str(config), override]) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "runs" / "tiny" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 1}}', "deepspeed `zero_optimization.stage` must be 2"),
        ("[]", "must hold a JSON object, got list"),
        ("{", "must be readable JSON"),
    ],
)
def test_a_deepspeed_config_that_conflicts_or_is_none(text, message, data, tmp_path, capsys):
    (tmp_path / "ds.json").write_text(text)
    config = write_config(tmp_path, data)
    arguments = ["train", str(config), "engine.kind=deepspeed", "--deepspeed_config", str(tmp_path / "ds.json")]
    assert main(arguments) == 3
    assert message in capsys.readouterr().err


def test_a_resume_may_not_change_what_the_run_is(data, tmp_path, capsys):
    config = write_config(tmp_path, data)
    assert main(["train", str(config)]) == 0
    for override, key in (
        ("seed=2", "seed"),
        ("model.d_model=32", "model.d_model"),
        ("objective.label_smoothing=0.1", "objective.label_smoothing"),
        ("batch.samples=7", "batch.samples"),
    ):
        capsys.readouterr()
        assert main(["train", str(config), "train.steps=8", override]) == 3
        assert f"error: `{key}` must stay" in capsys.readouterr().err
    assert main(["train", str(config), "train.resume=never"]) == 5
    assert "`train.resume` is never" in last_line(capsys.readouterr())


def test_a_resume_and_a_hand_off_need_the_data_of_the_run(data, tmp_path, capsys):
    mine, other = tmp_path / "mine", tmp_path / "other"
    shutil.copytree(data, mine)
    config, run = write_config(tmp_path, mine), tmp_path / "runs" / "tiny"
    source = f"tiny=text:{write_text(tmp_path / 'b.txt', 100)}"
    tokenizer = ["--tokenizer", str(data)]
    assert main(["prepare", "--out", str(other), "--source", source, *tokenizer, "--workers", "1"]) == 0
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "train.steps=8", f"data.path={other}"]) == 4
    told = last_line(capsys.readouterr())
    assert "`data.path` must give the data that run" in told and "`index_sha256` was " in told
    shutil.rmtree(mine)
    other.rename(mine)
    assert main(["handoff", str(run), "--out", str(tmp_path / "bundle")]) == 4
    assert "`data.path` must give the data that run" in last_line(capsys.readouterr())
    assert not (tmp_path / "bundle").exists()


def test_a_resume_needs_the_shards_it_began_with(data, tmp_path, capsys):
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    assert main(["train", str(config)]) == 0
    progress = run / "checkpoints" / "step-00000006" / "progress.json"
    content = json.loads(progress.read_text())
    assert content["progress"]["data"]["skipped"] == []
    content["progress"]["data"]["skipped"] = ["tiny-000007.tar"]
    progress.write_text(json.dumps(content))
    reseal(progress.parent)
    assert main(["train", str(config), "train.steps=8"]) == 4
    assert "`skipped` was ['tiny-000007.tar'], is []" in last_line(capsys.readouterr())


def test_the_configuration_is_printed_and_saved_whole(data, tmp_path, capsys):
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    assert main(["train", str(config)]) == 0
    saved = (run / "config.yaml").read_text()
    assert saved in capsys.readouterr().err
    assert yaml.safe_load(saved)["objective"]["corruption"]["encoder_ratio"] == 0.3, "a default that nobody typed"
    assert main(["train", str(run / "config.yaml"), "train.steps=7"]) == 0, "it is a configuration itself"
    assert read_events(run)[-3]["changed"] == {"train.steps": [6, 7]}
    short = {**yaml.safe_load(saved), "objective": {"name": "janus"}}
    (run / "config.yaml").write_text(yaml.safe_dump(short))
    assert main(["train", str(config), "train.steps=8"]) == 0, "options of a later version have their defaults"
    assert main(["train", str(config), "train.steps=9", "objective.pair_ratio=0.5"]) == 3
    assert "`objective.pair_ratio` must stay 0.7" in last_line(capsys.readouterr())


def test_other_kernels_are_told(data, tmp_path, capsys):
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    assert main(["train", str(config)]) == 0
    progress = run / "checkpoints" / "step-00000006" / "progress.json"
    content = json.loads(progress.read_text())
    assert content["progress"]["kernels"] == "torch"
    content["progress"]["kernels"] = "cuda"
    progress.write_text(json.dumps(content))
    reseal(progress.parent)
    capsys.readouterr()
    assert main(["train", str(config), "train.steps=7"]) == 0
    assert "kernels were cuda, are torch: the run goes on, not bit by bit\n" in capsys.readouterr().err
    assert main(["train", str(config), "train.steps=8"]) == 0
    assert "kernels were" not in capsys.readouterr().err


def test_events_after_a_line_that_was_cut_short(data, tmp_path):
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    assert main(["train", str(config)]) == 0
    whole = len(read_events(run))
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 17637')
    assert main(["train", str(config), "train.steps=7"]) == 0
    assert [e["event"] for e in read_events(run)[whole:]] == ["resume", "save", "finish"]


def test_a_tokenizer_that_is_not_the_manifests_is_refused(data, tmp_path, capsys):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"Ġ', '"Ġx', 1))
    assert main(["train", str(write_config(tmp_path, copy))]) == 4
    assert "tokenizer" in last_line(capsys.readouterr())


def test_bad_sources(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    for source in (f"text:{tmp_path}/missing-*.txt", f"text:{tmp_path}/empty.txt", "podcast:1"):
        out = ["prepare", "--out", str(tmp_path / "out"), "--workers", "1", "--train-tokenizer", "300"]
        assert main([*out, "--source", source]) == 4, source
        assert last_line(capsys.readouterr()).startswith("error: ")


def test_usage_errors_exit_2_and_help_imports_no_torch():
    for arguments in ([], ["fly"], ["train"], ["prepare", "--out", "x"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    script = "import sys, pretrain.__main__ as m\ntry: m.main(['-h'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().endswith("False")


def test_handoff_without_a_run_or_a_checkpoint(tmp_path, data, capsys):
    assert main(["handoff", str(tmp_path), "--out", str(tmp_path / "b")]) == 5
    assert "must be the folder of a run" in last_line(capsys.readouterr())


def test_two_jobs_may_not_share_a_run(data, tmp_path, capsys):
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    process = start("train", config, *LONG, "train.steps=100000")
    try:
        wait_for_save(process, run)
        assert main(["train", str(config), *LONG]) == 5
        assert "error: " in last_line(capsys.readouterr())
    finally:
        process.kill()
        process.communicate()


def test_a_full_disk_is_exit_code_6(data, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "tb/events")

    monkeypatch.setattr("pretrain.train.main", full)
    assert main(["train", str(write_config(tmp_path, data))]) == 6
    assert last_line(capsys.readouterr()) == "error: `tb/events` cannot be written: No space left on device"


def test_a_loss_that_is_not_finite_is_exit_code_7_and_is_never_committed(data, tmp_path, capsys, monkeypatch):
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    assert main(["train", str(config), "train.save_every=1", "train.steps=2"]) == 0
    true = Janus.losses

    def poisoned(self, model, batch, scale):
        total, sums = true(self, model, batch, scale)
        return total, {**sums, "kl_nar_aux": sums["kl_nar_aux"] * float("nan")}

    monkeypatch.setattr(Janus, "losses", poisoned)
    assert main(["train", str(config), "train.save_every=1"]) == 7
    assert "loss term `kl_nar_aux` must be finite, was nan at step 3" in last_line(capsys.readouterr())
    assert (run / "latest").read_text().strip() == "step-00000002"
    event = read_events(run)[-1]
    assert (event["event"], event["kind"], event["step"]) == ("error", "NonFiniteError", 2)


def test_a_run_that_lost_its_configuration_is_not_continued(data, tmp_path, capsys):
    config = write_config(tmp_path, data)
    assert main(["train", str(config), "train.steps=1", "train.save_every=1"]) == 0
    (tmp_path / "runs" / "tiny" / "config.yaml").unlink()
    assert main(["train", str(config), "train.steps=2", "objective.name=denoise", "seed=9"]) == 5
    assert "config.yaml` must be there" in last_line(capsys.readouterr())
    assert main(["train", str(config), "train.resume=never"]) == 5
    assert "`train.resume` is never" in last_line(capsys.readouterr())


def test_samples_are_not_written_through_a_link(data, tmp_path):
    (tmp_path / "victim").write_text("mine")
    samples = tmp_path / "runs" / "tiny" / "samples"
    samples.mkdir(parents=True)
    (samples / "step_000001.txt").symlink_to(tmp_path / "victim")
    assert main(["train", str(write_config(tmp_path, data)), "train.steps=1", "train.sample_every=1"]) == 0
    assert (tmp_path / "victim").read_text() == "mine" and not (samples / "step_000001.txt").is_symlink()


@pytest.mark.parametrize("value", ["2024-02-30", "!!int x", "9" * 5000])
def test_scalars_that_yaml_cannot_read(value, data, tmp_path, capsys):
    assert main(["train", str(write_config(tmp_path, data)), f"name={value}"]) == 3
    assert last_line(capsys.readouterr()).startswith("error: override `name=")

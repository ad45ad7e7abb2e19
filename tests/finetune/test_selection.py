"""The best checkpoints become the bundle, or their mean: whatever `keep` says and however often the run was killed."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune import selection
from finetune.__main__ import main
from finetune.config import Selection, TuneConfig, TuneTrainConfig
from finetune.selection import Candidate, average, candidates, choose
from pretrain.bundles.bundle import load_bundle
from pretrain.checkpoints.commit import Store
from pretrain.config import load
from pretrain.errors import ConfigError
from pretrain.hooks import Save
from pretrain.loop import Progress, StepReport
from tests.finetune.test_end_to_end import config_at, place  # noqa: F401 - a fixture

LOSS = Selection(metric="loss")


def test_the_mean_is_that_of_float64(tmp_path: Path) -> None:
    """Over checkpoints that two ranks wrote; values that float32 sums get wrong."""
    rng, made = np.random.default_rng(0), []
    for number in range(3):
        values = {"a.weight": rng.normal(size=(3, 4)) * 10.0**number, "b.bias": rng.normal(size=5) + 1e4}
        made.append({name: value.astype(np.float32) for name, value in values.items()})
        folder = tmp_path / str(number)
        folder.mkdir()
        for rank, (name, value) in enumerate(made[-1].items()):
            moments = {f"exp_avg/model.{name}": torch.full((2,), 1e9)}
            save_file({f"param/model.{name}": torch.from_numpy(value), **moments},
                      folder / f"state-rank{rank}.safetensors")  # fmt: skip
    mean = average([tmp_path / str(number) for number in range(3)])
    assert mean.keys() == made[0].keys()
    for name, value in mean.items():
        exact = np.mean([one[name].astype(np.float64) for one in made], axis=0)
        np.testing.assert_array_max_ulp(value.numpy(), exact, maxulp=2)
    alone = average([tmp_path / "1"])
    assert all(torch.equal(alone[name], torch.from_numpy(made[1][name])) for name in alone)


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(st.sampled_from([0.0, 1.0, 2.5, 3.0]), min_size=1, max_size=12),
    count=st.integers(1, 4),
    metric=st.sampled_from(["loss", "rougeL", None]),
)
def test_what_is_chosen_in_the_end_was_spared_all_along(scores: list[float], count: int, metric: str | None) -> None:
    """Retention sees a prefix; with what it spares, the choice is that of a run that kept everything."""
    select = None if metric is None else {"metric": metric}
    rhythm = {"validate_every": 1, "sample_every": 1, "save_every": 1}
    train = TuneTrainConfig.model_validate({"select": select, "average": count, **rhythm})
    tag = "valid/total" if metric == "loss" else "written/nar/rougeL"
    every = [Candidate(Path(f"step-{step}"), Progress(step=step), {tag: x}) for step, x in enumerate(scores, start=1)]
    kept: list[Candidate] = []
    for one in every:
        kept = sorted(choose([*kept, one], train, ("nar",)), key=lambda x: x.progress.step)
    chosen = choose(kept, train, ("nar",))
    assert chosen == choose(every, train, ("nar",)) and len(chosen) == min(count, len(scores))
    if metric is not None:
        best = min(scores) if metric == "loss" else max(scores)
        assert chosen[0].scores[tag] == best and chosen[0].progress.step == scores.index(best) + 1


def test_retention_spares(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in range(1, 6):
        staging = store.begin(step)
        (staging / "x").write_text("x")
        store.commit(staging, step, store.seal(staging, ["x"]))
    assert store.retain(1, {"step-00000002"}) == ["step-00000001", "step-00000003", "step-00000004"]
    assert [path.name for path in store.intact()] == ["step-00000002", "step-00000005"]
    (store.folder / "step-00000002" / "x").write_text("y")
    assert [path.name for path in store.intact()] == ["step-00000005"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"select": {"metric": "loss"}, "save_every": 100}, "`save_every` must be a multiple of `validate_every`"),
        ({"select": {"metric": "bleu"}, "sample_every": 3, "save_every": 4}, "of `sample_every` to select by `bleu`"),
        ({"select": {"metric": "cider"}, "sample_every": 2}, "`train.select.metric` must be one of loss, bleu,"),
        ({"select": {"metric": "bleu", "mode": "ar"}, "sample_every": 2}, "`train.select.mode` must be one of nar"),
        ({"average": 0}, "`train.average` must be greater than or equal to 1"),
    ],
)
def test_bad_choices(place: Path, train: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    values = {"steps": 2, "save_every": 2, **train}
    assert main(["train", str(config_at(place, "bad-choice", "nar", train=values))]) == 3
    assert message in capsys.readouterr().err
    assert not (place / "runs" / "bad-choice" / "checkpoints").exists()


def test_selection_needs_validation_pairs() -> None:
    train = TuneTrainConfig(select=LOSS, validate_every=1, save_every=1)
    with pytest.raises(ConfigError, match="must be null where the task has no validation pairs"):
        selection.check(train, ("bleu",), ("nar",), validated=False)


STEPS = 8
CHANGES: dict[str, Any] = {
    "optim": {"lr": 1.0, "schedule": "constant", "weight_decay": 0.0},
    "train": {
        "steps": STEPS, "save_every": 2, "validate_every": 1, "keep": 1, "select": {"metric": "loss"}, "average": 2,
    },
}  # fmt: skip


def validation_losses(run: Path) -> dict[int, float]:
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("valid/total")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_bundle(run / "bundle").model.state_dict()


def test_the_best_is_kept_under_kills_and_signals(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    whole = place / "runs" / "chosen-whole"
    assert main(["train", str(config_at(place, "chosen-whole", "nar", **CHANGES))]) == 0
    losses = validation_losses(whole)
    best = sorted(range(2, STEPS + 1, 2), key=lambda step: losses[step])[:2]
    assert best != [8, 6] and set(best) != {6, 8}  # or nothing would have been at stake
    provenance = load_bundle(whole / "bundle").provenance
    assert provenance["checkpoints"] == best and provenance["selected_by"] == "valid/total"
    told = [scores["valid/total"] for scores in provenance["scores"]]
    assert told == pytest.approx([losses[step] for step in best], rel=1e-6)
    shown = f"| validation loss | {' | '.join(f'{value:.6g}' for value in told)} |"
    assert shown in (whole / "bundle" / "README.md").read_text(encoding="utf-8")
    assert provenance["step"] == max(best)
    kept = {path.name for path in Store(whole).commits()}
    assert kept == {f"step-{step:08d}" for step in {*best, STEPS}}

    parts = config_at(place, "chosen-parts", "nar", **CHANGES)
    now, due = Save.now, Save.after_step

    def dies(step: int) -> Any:
        def save(self: Save, progress: Progress) -> None:
            if progress.step == step:
                raise KeyboardInterrupt
            now(self, progress)

        return save

    def signalled(self: Save, report: StepReport) -> None:
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        due(self, report)

    for step in (2, 4, 6, 8):  # after it was measured, before it was saved
        monkeypatch.setattr(Save, "now", dies(step))
        with pytest.raises(KeyboardInterrupt):
            main(["train", str(parts)])
        monkeypatch.setattr(Save, "now", now)
        if step == 4:  # a signal leaves a checkpoint of step 3, which is measured but was not asked for
            monkeypatch.setattr(Save, "after_step", signalled)
            assert main(["train", str(parts)]) == 85
            monkeypatch.setattr(Save, "after_step", due)
            store = Store(place / "runs" / "chosen-parts")
            assert store.commits()[-1].name == "step-00000003"
            assert [one.progress.step for one in candidates(store)] == [2]
    assert main(["train", str(parts)]) == 0
    run = place / "runs" / "chosen-parts"
    assert load_bundle(run / "bundle").provenance["checkpoints"] == best
    one, two = weights(whole), weights(run)
    assert all(torch.equal(one[name], two[name]) for name in one)

    # Another choice among the checkpoints that are there needs no training.
    assert main(["train", str(parts), "train.average=1"]) == 0
    alone = config_at(place, "chosen-alone", "nar", **{**CHANGES, "train": {"steps": best[0], "save_every": 2}})
    assert main(["train", str(alone)]) == 0
    one, two = weights(place / "runs" / "chosen-alone"), weights(run)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_last_ones_are_averaged(place: Path) -> None:  # noqa: F811
    train = {"steps": 5, "save_every": 2, "keep": 1, "average": 3}
    path = config_at(place, "last-three", "ar", train=train)
    assert main(["train", str(path)]) == 0
    run = place / "runs" / "last-three"
    provenance = load_bundle(run / "bundle").provenance
    assert provenance["checkpoints"] == [5, 4, 2] and len(provenance["scores"]) == 3
    assert load(TuneConfig, run / "config.yaml").train.average == 3
    mean = average([run / "checkpoints" / f"step-{step:08d}" for step in (2, 4, 5)])
    for name, value in weights(run).items():
        if name in mean:
            torch.testing.assert_close(value, mean[name].float(), rtol=1e-6, atol=1e-8)


def test_a_choice_that_comes_too_late_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    path = config_at(place, "too-late", "nar", train={"steps": 2, "save_every": 2})
    assert main(["train", str(path)]) == 0
    capsys.readouterr()
    assert main(["train", str(path), "train.select.metric=loss", "train.validate_every=1"]) == 5
    assert "must have an intact checkpoint that keeps `valid/total`, it has none" in capsys.readouterr().err

"""Every study that ships: each of its commands is one that its program takes, and each claim says what it compares."""

from itertools import pairwise
from pathlib import Path

import pytest

from finetune import tasks
from finetune.__main__ import OPTIONS
from finetune.config import TuneConfig
from finetune.reproduce.claim import with_needs
from finetune.reproduce.command import claims_of
from finetune.reproduce.step import Step
from finetune.reproduce.study import Study
from finetune.scores import METRICS
from finetune.train import complete_options
from pretrain import objectives
from pretrain.config import RunConfig, complete, load
from pretrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
STUDIES = sorted((ROOT / "configs" / "reproduce").glob("*.yaml"))


@pytest.fixture(params=STUDIES, ids=lambda path: path.stem)
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    monkeypatch.chdir(ROOT)
    claims = list(claims_of(load(Study, request.param)))
    return with_needs([step for claim in claims for step in claim.steps])


def test_trainings_have_valid_settings(steps: list[Step]) -> None:
    found = {"finetune": 0, "pretrain": 0}
    for step in steps:
        words = list(step.command)
        if "train" not in words:
            continue
        program, config, *overrides = words[words.index("-m") + 1], *words[words.index("train") + 1 :]
        found[program] += 1
        if program == "finetune":
            settings = complete_options(load(TuneConfig, config, overrides))
            assert tasks.build(settings.task).name == settings.task["name"]
            assert settings.train.steps and settings.runs.startswith("runs/reproduce")
        else:
            of_run = load(RunConfig, config, overrides)
            complete(objectives.REGISTRY, of_run.objective, "objective")
    assert found["finetune"] > 20 and found["pretrain"] >= 4


def test_every_file_a_step_reads_is_made_by_what_it_needs(steps: list[Step]) -> None:
    for step in steps:
        before = with_needs(step.needs)
        made = {str(path) for one in before for path in (one.output, one.makes) if path is not None}
        made |= {
            one.command[one.command.index(flag) + 1]
            for one in before
            for flag in ("--output", "--out")
            if flag in one.command
        }
        made |= {one.command[-1] for one in before if one.command[0] == "cp"}
        for flag in ("--hyp", "--against"):
            if flag in step.command:
                assert step.command[step.command.index(flag) + 1] in made, step.line
        if "generate" in step.command:
            assert step.command[4] in made, step.line
            mode = step.command[step.command.index("--mode") + 1]
            taken = {f"--{name.replace('_', '-')}" for name in OPTIONS[mode]} | {
                "--mode",
                "--device",
                "--input",
                "--output",
            }
            assert {word for word in step.command if word.startswith("--")} <= taken
        if "--metrics" in step.command:
            assert set(step.command[step.command.index("--metrics") + 1].split(",")) <= set(METRICS)


def test_names_and_outputs_are_each_of_one_step(steps: list[Step]) -> None:
    assert len({step.name for step in steps}) == len(steps) == len({step.key for step in steps})
    outputs = [step.output for step in steps if step.output is not None]
    assert len(set(outputs)) == len(outputs)


def test_a_later_round_goes_on_behind_what_the_earlier_one_kept(steps: list[Step]) -> None:
    by_name = {step.name: step for step in steps}
    trained = [step for step in steps if step.name.startswith("train/multi30k-janus-1-")]
    assert len(trained) >= 2
    for before, after in pairwise(trained):
        assert by_name[before.name.replace("train/", "keep/")] in after.needs


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_claim_has_comparisons_that_fit_its_table(path: Path) -> None:
    for claim in claims_of(load(Study, path)):
        assert claim.comparisons and claim.rows
        for row in claim.rows:
            assert len(claim.columns) == 1 + len(row.values) + len(row.paper), claim.heading
        for one in claim.comparisons:
            assert one.test is None or one.metric


def test_seeds_come_last_and_are_of_translation_alone() -> None:
    study = load(Study, STUDIES[0], ["seeds=[1,2]"])
    names = [step.name for claim in claims_of(study) for step in claim.steps if step.name.startswith("train/")]
    second = [at for at, name in enumerate(names) if name.startswith("train/multi30k-janus-2")]
    others = [at for at, name in enumerate(names) if "-2-" not in name]
    assert second and min(second) > max(others)


@pytest.mark.parametrize(
    ("override", "message"),
    [("rounds=[]", "rounds"), ("jobs=0", "jobs"), ("device=tpu", "device"), ("tuning.tasks={xsum: {}}", "tuning.tasks"),
     ("translation.vocab=4096", "vocabulary")],
)  # fmt: skip
def test_a_bad_study_is_told(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(Study, STUDIES[0], [override])

"""Every shipped fine-tuning configuration is valid, its task exists and its runner fits bundles of every kind."""

from pathlib import Path

import pytest

from finetune import runners, selection, tasks
from finetune.config import TuneConfig
from pretrain.bundles.description import Description, Mode
from pretrain.config import load
from pretrain.models.patterns import ArLayout, Layout
from pretrain.objectives import build
from tests.finetune.models import IDS, tiny_model

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "finetune"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_configurations() -> None:
    exits = {"hard_exit.yaml", "soft_exit.yaml"}
    masked = {"nar.yaml", "nar_corr.yaml", "nar_rdrop.yaml", "janus.yaml"}
    assert {path.name for path in CONFIGS} >= {"ar.yaml"} | masked | exits


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(path.parts[-2:]))
def test_shipped_configuration(path: Path) -> None:
    settings = load(TuneConfig, path)
    task = tasks.build(settings.task)
    assert task.name == settings.task["name"]
    kinds: list[tuple[Layout, tuple[Mode, ...]]]
    kinds = [("bos_first", ("ar", "nar")), ("eos_first", ("causal",)), ("bos_first", ("nar",))]
    for layout, modes in kinds:
        about = Description(tiny_model().config, IDS, ArLayout.aligned(layout, IDS), modes, {})
        runner = runners.build(settings.runner, about)
        assert build(runner.objective, IDS, None, runner.model).modes[0] == runner.modes[0]
        selection.check(settings.train, task.metrics, runners.ways(settings.runner["name"], runner), validated=True)

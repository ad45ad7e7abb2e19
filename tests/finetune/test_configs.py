"""Every shipped fine-tuning configuration is valid, its task exists and its runner fits bundles of every kind."""

from pathlib import Path

import pytest

from finetune import runners, selection, tasks
from finetune.config import PRESETS, TuneConfig, with_presets
from finetune.train import build_runner, complete_options
from pretrain.bundles.bundle import Bundle
from pretrain.bundles.description import Description, Mode
from pretrain.config import load
from pretrain.errors import ConfigError
from pretrain.models.patterns import ArLayout, Layout
from pretrain.objectives import build
from pretrain.parsing import read_yaml
from tests.finetune.models import IDS, tiny_model

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "finetune"
BASES = sorted((FOLDER / "base").glob("*.yaml"))
RUNNERS = ("ar", "nar", "hard_exit", "soft_exit")
CONFIGS = sorted(set(FOLDER.rglob("*.yaml")) - set(BASES))


def test_every_task_has_a_configuration_for_every_runner() -> None:
    found = {(path.parent.name.replace("_", "-"), path.stem) for path in CONFIGS}
    assert found >= {(task, runner) for task in tasks.REGISTRY for runner in RUNNERS}
    assert set(RUNNERS) <= set(runners.REGISTRY)
    used = {(path.parent / read_yaml(path)["base"]).resolve() for path in CONFIGS if "base" in read_yaml(path)}
    assert used == set(BASES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(path.parts[-2:]))
def test_shipped_configuration(path: Path) -> None:
    settings = complete_options(load(TuneConfig, path))
    assert settings.name == f"{path.parent.name}-{path.stem}".replace("_", "-")
    task = tasks.build(settings.task)
    assert task.name == settings.task["name"] == path.parent.name.replace("_", "-")
    assert settings.runner["name"] == path.stem or path.stem not in RUNNERS
    kinds: list[tuple[Layout, tuple[Mode, ...]]]
    kinds = [("bos_first", ("ar", "nar")), ("eos_first", ("causal",)), ("bos_first", ("nar",))]
    for layout, modes in kinds:
        model = tiny_model(max_positions=512)
        about = Description(model.config, IDS, ArLayout.aligned(layout, IDS), modes, {})
        runner = build_runner(settings, Bundle(model, about, None, {}, None))  # type: ignore[arg-type]
        assert build(runner.objective, IDS, None, runner.model).modes[0] == runner.modes[0]
        selection.check(settings.train, task.metrics, runners.ways(settings.runner["name"], runner), validated=True)
    # What is written in validation may be as long as what is trained, and no longer.
    decoding = settings.runner["decoding"]
    for section in [decoding[mode] for mode in ("ar", "nar") if mode in decoding] or [decoding]:
        assert (section["max_length"] or settings.runner["rows"] + 1) == settings.max_target


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(path.parts[-2:]))
def test_smoke_preset(path: Path) -> None:
    settings = complete_options(load(TuneConfig, path, with_presets(["preset=smoke", "task.limit=5"])))
    assert (settings.train.steps, settings.train.epochs, settings.batch.samples, settings.task["limit"]) == (
        2,
        None,
        4,
        5,
    )
    assert (
        settings.run_dir.parent.name == "smoke" and settings.runner == complete_options(load(TuneConfig, path)).runner
    )


def test_a_preset_stands_where_it_is_given() -> None:
    assert with_presets(["a=1", "preset=smoke", "b=2"]) == ["a=1", *PRESETS["smoke"], "b=2"]
    with pytest.raises(ConfigError, match="`preset` must be one of smoke, got 'smok'"):
        with_presets(["preset=smok"])


@pytest.mark.parametrize(
    ("name", "runner", "lr", "warmup", "epochs"),
    [("ar", {"decoding.beam": 5}, 3e-5, 200, 10), ("nar", {"label_smoothing": 0.1}, 1e-4, 1000, 50),
     ("hard_exit", {"threshold": 0.5}, 2e-5, 0, 50), ("soft_exit", {"given": 0.3}, 2e-5, 0, 50)],
)  # fmt: skip
def test_the_papers_setting_for_glge(
    name: str, runner: dict[str, float], lr: float, warmup: int, epochs: float
) -> None:
    """JANUS, section 4.2; ELMER, appendix B."""
    for task, longest in (("xsum", 64), ("squad_qg", 64), ("personachat", 32)):
        settings = complete_options(load(TuneConfig, FOLDER / task / f"{name}.yaml"))
        assert (settings.max_source, settings.max_target, settings.batch.samples) == (512, longest, 20)
        assert (settings.optim.lr, settings.optim.warmup, settings.train.epochs) == (lr, warmup, epochs)
        for key, value in runner.items():
            found = settings.runner
            for part in key.split("."):
                found = found[part]
            assert found == value


def test_the_papers_setting_for_translation() -> None:
    """JANUS, section 4.2, and its released scripts."""
    tokens = {"iwslt14_de_en": 8192, "wmt14_en_de": 131072, "wmt14_de_en": 131072, "wmt16_en_ro": 32768}
    for task, batch in {**tokens, "wmt16_ro_en": 32768}.items():
        settings = complete_options(load(TuneConfig, FOLDER / task / "nar.yaml"))
        assert (settings.batch.tokens, settings.max_target, settings.train.steps) == (batch, 200, 200_000)
        assert (settings.optim.lr, settings.optim.warmup, settings.optim.schedule) == (5e-4, 10_000, "inverse_sqrt")
        assert settings.optim.weight_decay == (1e-4 if task.startswith("iwslt") else 0.01)
        decoding = settings.runner["decoding"]
        assert (decoding["iterations"], decoding["length_beam"], decoding["length_choice"]) == (10, 3, "contiguous")

"""Configuration of a tuning run: one YAML, sections shared with pre-training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pretrain.config import NAME, BatchConfig, EngineConfig, OptimConfig, Section, TrainConfig
from pretrain.errors import ConfigError

# What `preset=NAME` on the command line stands for, whatever the YAML.
PRESETS: dict[str, tuple[str, ...]] = {
    # A few updates on a few pairs: do data, bundle and settings fit? In a folder of its own, so that the real run does
    # not go on from it.
    "smoke": (
        "runs=runs/smoke",
        "task.limit=16",
        "shown=2",
        "workers=0",
        "batch.tokens=null",
        "batch.samples=4",
        "optim.warmup=0",
        "engine.precision=fp32",
        "train.epochs=null",
        "train.steps=2",
        "train.log_every=1",
        "train.validate_every=2",
        "train.validate_batches=1",
        "train.sample_every=2",
        "train.save_every=2",
    ),
}


class Selection(Section):
    """By what the best checkpoint is chosen. metric: `loss` (of validation) or one of the task's scores of whole texts.

    mode: the way of writing whose texts are scored; null: the runner's first.
    """

    metric: str
    mode: str | None = None


class TuneTrainConfig(TrainConfig):
    """Adds which checkpoint becomes the bundle. select: the best one; null: the end of training.

    average: the mean of the weights of so many checkpoints instead: the best ones, or without `select` the last ones.
    Only checkpoints that `save_every` asks for, and that of the last update, are chosen among, not those that a signal
    leaves behind; they are kept whatever `keep` says.
    """

    select: Selection | None = None
    average: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _measured_when_saved(self) -> "TuneTrainConfig":
        if self.select is not None:
            name = "validate_every" if self.select.metric == "loss" else "sample_every"
            every = getattr(self, name)
            if not every or self.save_every % every:
                raise ValueError(
                    f"`save_every` must be a multiple of `{name}` to select by `{self.select.metric}`, "
                    f"got {self.save_every} and {every}"
                )
        return self


class TuneConfig(Section):
    """Everything `python -m finetune train` needs; saved into the run folder as `config.yaml`.

    bundle: hand-off bundle to start from. task, runner: `name` in their registry and options. workers: processes that
    corrupt and collate. max_source, max_target: tokens with BOS and EOS; longer sources are cut, here and when the
    tuned bundle writes; pairs with longer targets are left out of training and validation losses. shown: validation
    pairs whose texts are written out whenever `train.sample_every` is due. scored: those that are written and scored
    then, at least the ones shown; null: those alone.
    """

    name: str = Field(pattern=NAME)
    runs: str = "runs"
    seed: int = Field(1, ge=0, lt=2**31)
    bundle: str
    task: dict[str, Any]
    runner: dict[str, Any]
    max_source: int = Field(256, ge=3)
    max_target: int = Field(64, ge=3)
    workers: int = Field(0, ge=0, le=64)
    shown: int = Field(16, ge=1)
    scored: int | None = Field(None, ge=1)
    batch: BatchConfig
    optim: OptimConfig = OptimConfig(lr=3e-4, weight_decay=0.01)
    engine: EngineConfig = EngineConfig(kind="local")
    train: TuneTrainConfig = TuneTrainConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs) / self.name


def with_presets(overrides: Sequence[str]) -> list[str]:
    """`overrides` with what each `preset=NAME` stands for in its place, so that those after it win.

    Raises:
        ConfigError: there is no such preset.
    """
    expanded: list[str] = []
    for override in overrides:
        key, _, name = override.partition("=")
        if key == "preset" and name not in PRESETS:
            raise ConfigError(f"`preset` must be one of {', '.join(PRESETS)}, got {name!r}")
        expanded += PRESETS[name] if key == "preset" else (override,)
    return expanded

"""Configuration of a tuning run: one YAML, sections shared with pre-training."""

from pathlib import Path
from typing import Any

from pydantic import Field

from pretrain.config import BatchConfig, EngineConfig, OptimConfig, Section, TrainConfig


class TuneConfig(Section):
    """Everything `python -m finetune train` needs; saved into the run folder as `config.yaml`.

    bundle: hand-off bundle to start from. task, runner: `name` in their registry and options. workers: processes that
    corrupt and collate. max_source, max_target: tokens with BOS and EOS; longer sources are cut, here and when the
    tuned bundle writes; pairs with longer targets are left out of training and validation losses. shown: validation
    pairs that are written out and scored whenever `train.sample_every` is due.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    runs: str = "runs"
    seed: int = Field(1, ge=0, lt=2**31)
    bundle: str
    task: dict[str, Any]
    runner: dict[str, Any]
    max_source: int = Field(256, ge=3)
    max_target: int = Field(64, ge=3)
    workers: int = Field(0, ge=0, le=64)
    shown: int = Field(16, ge=1)
    batch: BatchConfig
    optim: OptimConfig = OptimConfig(lr=3e-4, weight_decay=0.01)
    engine: EngineConfig = EngineConfig(kind="local")
    train: TrainConfig = TrainConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs) / self.name

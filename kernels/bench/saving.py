"""What a checkpoint costs training: written in the background, and at once."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, require
from steps import IDS, examples

from pretrain.checkpoints.checkpoint import open_store
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.saver import Saved, Saver
from pretrain.checkpoints.seal import MANIFEST, verify
from pretrain.config import EngineConfig, ModelConfig, OptimConfig
from pretrain.distributed import World
from pretrain.engine import Engine
from pretrain.engine import build as build_engine
from pretrain.models import EncoderDecoder
from pretrain.objectives import ObjectiveModule, build

ALONE = World(0, 1, 0, torch.device("cpu"))
BASE = ModelConfig(
    vocab_size=50265, d_model=768, encoder_layers=6, decoder_layers=6, heads=12, ffn_dim=3072,
    dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
SAMPLES, LENGTH = 2, 32
REPEATS, CALM = 3, 5
EVERY, LIMIT = 300.0, 3.5  # seconds between saves; per cent of them that CheckFreq (FAST 2021) allows


def row() -> Row:
    """`save_stall`: per cent of five minutes that training loses to a save, standing still or slowed down."""
    torch.manual_seed(0)
    objective = build({"name": "denoise", "ar_layout": "bos_first"}, IDS, None, BASE)
    module = ObjectiveModule(EncoderDecoder(BASE, IDS), objective)
    engine = build_engine(EngineConfig(kind="local"), OptimConfig(), module, ALONE)
    batch = objective.collate(examples([LENGTH] * SAMPLES, np.random.default_rng(0)))

    def update() -> float:
        began = time.perf_counter()
        engine.accumulate([batch], {term: 1.0 / count for term, count in objective.counts(batch).items() if count})
        engine.step(1e-4)
        return time.perf_counter() - began

    update()
    with tempfile.TemporaryDirectory() as place:
        beside, at_once = (_Runs(engine, Path(place) / name, update) for name in ("beside", "at_once"))
        meanwhile = [0.0]
        one, other = at_once.save(1, []), beside.save(1, meanwhile)
        same = (one.path / MANIFEST).read_bytes() == (other.path / MANIFEST).read_bytes()
        require(
            same and len(meanwhile) > 1 and not verify(other.path),
            "what is written beside training must be what is written at once",
        )
        size = sum(file.stat().st_size for file in other.path.iterdir())
        whole, stalls, slower = [], [], []
        for repeat in range(2, 2 + REPEATS):
            calm = statistics.median(update() for _ in range(CALM))
            whole.append(at_once.save(repeat, []).seconds)
            updates = [0.0]
            stalls.append(beside.save(repeat, updates).seconds)
            slower.append(max(0.0, sum(updates) - calm * (len(updates) - 1)))
    stall, slow = statistics.median(stalls), statistics.median(slower)
    waiting, parameters = statistics.median(whole), sum(parameter.numel() for parameter in module.parameters())
    return Row(
        "save_stall",
        100.0 * (stall + slow) / EVERY,
        LIMIT,
        "max",
        f"% of {EVERY:.0f} s: {stall:.2f} s standing still and {slow:.2f} s of slower updates, {waiting:.2f} s where "
        f"training waits for the disk; {parameters / 1e6:.0f} M parameters, {size / 1e9:.2f} GB, the same bytes",
    )


class _Runs:
    """Saves of an engine into a run of its own, of which the newest is kept."""

    def __init__(self, engine: Engine, folder: Path, update: Callable[[], float]) -> None:
        self.store: Store = open_store(folder)[0]
        self.saver, self.update = Saver(self.store, engine, ALONE, keep=1), update

    def save(self, step: int, updates: list[float]) -> Saved:
        """One save; beside updates, whose seconds are added, where `updates` holds something."""
        self.saver.start(step, {})
        while updates and self.saver.writing:
            updates.append(self.update())
        saved: Any = self.saver.finish()
        return saved

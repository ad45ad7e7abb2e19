"""ZeRO-3 where every rank has other exits: no rank waits for a module that another does not call."""

from typing import Any

import numpy as np
import pytest
import torch

from pretrain.config import EngineConfig, OptimConfig
from pretrain.distributed import World
from pretrain.engine import build
from pretrain.engine.calls import CallGuard
from pretrain.loop import global_counts, global_means
from pretrain.models import EncoderDecoder, encoder_decoder
from pretrain.objectives import ObjectiveModule
from pretrain.objectives import build as build_objective
from pretrain.objectives.lplm import ExitExample
from tests.distributed_helper import run_ranks
from tests.e2e.test_ranks import SHAPE
from tests.pretrain.objectives.cases import IDS, VOCAB, examples

ROUNDS, RANKS = 50, 2
DEEP = SHAPE.model_copy(update={"decoder_layers": 3})
OPTIM = OptimConfig(lr=1e-3)
COPIES = 2
KINDS: dict[str, dict[str, Any]] = {
    "lplm": {"name": "lplm", "copies": COPIES},
    # At the entropies of a model that has hardly learned, so that exits differ.
    "simulated": {"name": "hard_exit", "training": "simulated", "threshold": 3.5},
    "soft_exit": {"name": "soft_exit", "given": 0.3},
}
TERMS = {"lplm": "lplm", "hard_exit": "hard_exit", "soft_exit": "exit_3"}


def batch_of(objective: Any, round_: int, rank: int) -> Any:
    """Whatever could set ranks apart: no sample, all at the first layer, all at the last, one layer left out, any."""
    rng = np.random.default_rng([round_, rank])
    kind, layers = int(rng.integers(5)), DEEP.decoder_layers
    chosen = {1: [1], 2: [layers], 3: [1, layers]}.get(kind, list(range(1, layers + 1)))
    made = []
    for e in examples(seed=round_ * RANKS + rank, sizes=[(3, 4, 0), (2, 6, 0), (4, 1, 0)])[: kind and 3]:
        exits = rng.choice(chosen, size=(COPIES, len(e.target) - 1))
        made.append(ExitExample(e.source, e.target, e.masked, exits))  # hard_exit lets the model decide
    if objective.modes == ("soft_exit",):
        made = [objective.corrupt_pair(e.source, e.target, rng) for e in made]
    return objective.collate(made)


def train(world: World, kind: str, ranks: int, options: dict[str, Any]) -> list[float]:
    """Losses of the global batch of every round, cut into `ranks` micro-batches."""
    torch.manual_seed(0)
    encoder_decoder.MAX_LOGITS = 8 * VOCAB  # blocks of eight rows: some ranks have more of them
    config = DEEP.model_copy(update={"soft_exit": options["name"] == "soft_exit"})
    objective = build_objective(options, IDS, None, config)
    module = ObjectiveModule(EncoderDecoder(config, IDS), objective)
    engine = build(EngineConfig(kind=kind, zero_stage=3, check_calls=True), OPTIM, module, world)  # type: ignore[arg-type]
    losses = []
    for round_ in range(ROUNDS):
        batches = [batch_of(objective, round_, rank) for rank in range(world.rank, ranks, world.size)]
        counts, _ = global_counts(objective, batches)
        scale = {t: w * engine.loss_factor / max(1, counts[t]) for t, w in objective.weights.items()}
        losses.append(global_means(engine.accumulate(batches, scale), counts).get(TERMS[options["name"]], 0.0))
        engine.step(OPTIM.lr)
    return losses


@pytest.mark.parametrize("name", KINDS)
def test_ranks_with_other_exits_train_on_as_one(name: str) -> None:
    alone = run_ranks(train, 1, "local", RANKS, KINDS[name])[0]
    together = run_ranks(train, RANKS, "deepspeed", RANKS, KINDS[name])
    assert together[0] == together[1]
    np.testing.assert_allclose(together[0], alone, rtol=1e-4)


def differ(world: World, more: bool) -> str:
    """Rank 1 skips the second of three modules, or the last."""
    module = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    guard = CallGuard(module, world)
    try:
        for number in (0, 1, 2) if world.rank == 0 else (0, 1) if more else (0, 2):
            module[number](torch.zeros(1, 2))
        guard.end()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (False, "call 2 is: rank 0 calls `1`, rank 1 calls `2`"),
        (True, "call 3 is: rank 0 calls `2`, rank 1 is done"),
    ],
)
def test_the_first_module_that_differs_is_named(more: bool, message: str) -> None:
    for told in run_ranks(differ, 2, more):
        assert told == f"ranks must call the same modules in the same order; {message}"

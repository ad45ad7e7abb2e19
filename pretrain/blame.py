"""A number was not finite: on which rank, in which term, in whose gradient? Asked only when it has happened."""

import math
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pretrain.distributed import exchange, shared
from pretrain.engine import Engine
from pretrain.errors import NonFiniteError


def check_losses(engine: Engine, losses: Mapping[str, float], sums: Mapping[str, float], step: int) -> None:
    """Raises NonFiniteError, shared, where one of the global means `losses` is not finite; collective only then.

    sums: of this rank, by which the ranks that began it are told from those that only heard of it.
    """
    bad = next((term for term, value in losses.items() if not math.isfinite(value)), None)
    if bad is None:
        return
    where = _ranks(None if math.isfinite(sums[bad]) else "")
    weight = _weight(engine)
    raise shared(
        NonFiniteError(
            f"loss term `{bad}` must be finite, was {losses[bad]} at step {step}{where}; not applied"
            + (f"; weight `{weight}` is not finite, only an earlier checkpoint helps" if weight else "")
        )
    )


def bad_gradient(
    engine: Engine,
    batches: Sequence[Any],
    scale: Mapping[str, float],
    losses: Mapping[str, float],
    norm: float,
    step: int,
) -> NonFiniteError:
    """The error of a gradient that was not finite; collective.

    Engines keep sums over ranks, so each rank computes its own gradients again, term by term, with other dropout.
    """
    terms = " ".join(f"{term} {value:.4g}" for term, value in losses.items())
    found = None
    if engine.whole_gradients:
        found = next((f" of {one}" for batch in batches if (one := _gradient(engine, batch, scale))), None)
    where = _ranks(found)
    if engine.whole_gradients and not where:
        where = " and finite on every rank when it was computed again"
    message = f"gradient norm must be finite, was {norm} at step {step} ({terms}){where}; not applied"
    return shared(NonFiniteError(message))


def _ranks(mine: str | None) -> str:
    """` on rank 1 (host-b) of ...`: of the ranks whose `mine` is not None; collective."""
    told = exchange([socket.gethostname(), mine])
    bad = [(rank, host, what) for rank, (host, what) in enumerate(told) if what is not None]
    if not bad:
        return ""
    rank, host, what = bad[0]
    ranks = f"{len(bad)} ranks, the first" if len(bad) > 1 else ""
    return f" on {f'{ranks} ' if ranks else ''}rank {rank} ({host}){what}"


def _weight(engine: Engine) -> str | None:
    """The first weight of the forward that is not finite, as far as it lies on this rank."""
    weights = engine.parameters().items()
    return next((name for name, value in weights if not bool(torch.isfinite(value.detach()).all())), None)


def _gradient(engine: Engine, batch: Any, scale: Mapping[str, float]) -> str | None:
    """`term ..., weight ...` of the first gradient of this rank that is not finite; it meets no gradient of others."""
    module, names = engine.module, engine.parameters()
    batch = batch.to(engine.world.device)
    for term, factor in scale.items():
        if factor == 0:
            continue
        alone = {name: value if name == term else 0.0 for name, value in scale.items()}
        total, _ = module.objective.losses(module.model, batch, alone)
        if not total.requires_grad:
            continue
        gradients = torch.autograd.grad(total, list(names.values()), allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                return f"term `{term}`, weight `{name}`"
    return None

"""May a configuration continue the run that stands in its folder?"""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel

from pretrain import runs
from pretrain.checkpoints.checkpoint import read_progress
from pretrain.checkpoints.commit import Store
from pretrain.errors import CheckpointError
from pretrain.run import Settings


def claim(
    settings: Settings,
    store: Store,
    complete: Callable[[Any], BaseModel],
    fixed: Sequence[str],
    free: Sequence[str] = (),
) -> dict[str, Any]:
    """What changed since the run was last started; raises where this configuration may not continue it.

    What the newest checkpoint keeps of its configuration goes before config.yaml, which people can edit.

    complete: fills in the defaults of options that config.yaml or checkpoint may be too old to hold.
    """
    assert isinstance(settings, BaseModel)
    newest = store.latest() if settings.train.resume == "auto" else None
    if newest is None and not store.commits():
        return {}
    if settings.train.resume == "never":
        raise CheckpointError(
            f"run `{settings.run_dir}` has checkpoints and `train.resume` is never: choose another `name`"
        )
    before = runs.read_config(settings.run_dir, type(settings))
    if before is None:
        raise CheckpointError(
            f"`{settings.run_dir / runs.CONFIG}` must be there: without it nobody knows what its checkpoints were "
            "trained as; bring it back, or choose another `name`"
        )
    saved = read_progress(newest)["progress"].get("fixed") if newest else None
    past = complete(runs.with_fixed(complete(before), saved, free))
    return runs.check_continues(settings, past, settings.run_dir, fixed, free)

"""The registry of runners: a new one is its file, one line here, one YAML and one test."""

from collections.abc import Callable, Mapping
from typing import Any

from finetune.runners.ar import Ar, ArOptions
from finetune.runners.base import Runner, with_modes
from finetune.runners.draft import Draft, DraftOptions
from finetune.runners.hard_exit import HardExitRunner, HardExitRunnerOptions
from finetune.runners.janus import Janus, JanusRunnerOptions
from finetune.runners.nar import Nar, NarOptions
from finetune.runners.soft_exit import SoftExit, SoftExitRunnerOptions
from pretrain.bundles.description import Description
from pretrain.config import Section, choose

__all__ = ["REGISTRY", "Runner", "build", "ways", "with_modes"]

REGISTRY: dict[str, tuple[type[Section], Callable[..., Runner]]] = {
    "ar": (ArOptions, Ar),
    "nar": (NarOptions, Nar),
    "janus": (JanusRunnerOptions, Janus),
    "draft": (DraftOptions, Draft),
    "hard_exit": (HardExitRunnerOptions, HardExitRunner),
    "soft_exit": (SoftExitRunnerOptions, SoftExit),
}


def build(options: Mapping[str, Any], description: Description) -> Runner:
    """The runner that `options["name"]` names, for a bundle.

    Raises:
        ConfigError: the name or an option is unknown or out of range.
    """
    chosen, make = choose(REGISTRY, options, "runner")
    return make(chosen, description)


def ways(name: str, runner: Runner) -> dict[str, Runner]:
    """{`--mode` of `generate`: what writes so} of everything that the runner of that name tunes for."""
    return dict(runner.ways) if isinstance(runner, Janus) else {name: runner}

"""The registry of runners: a new one is its file, one line here, one YAML and one test."""

from collections.abc import Callable, Mapping
from typing import Any

from finetune.runners.ar import Ar, ArOptions
from finetune.runners.base import Runner, with_modes
from finetune.runners.draft import Draft, DraftOptions
from finetune.runners.hard_exit import HardExitRunner, HardExitRunnerOptions
from finetune.runners.nar import Nar, NarOptions
from finetune.runners.soft_exit import SoftExit, SoftExitRunnerOptions
from pretrain.bundles.description import Description
from pretrain.config import Section, choose

__all__ = ["REGISTRY", "Runner", "build", "with_modes"]

REGISTRY: dict[str, tuple[type[Section], Callable[..., Runner]]] = {
    "ar": (ArOptions, Ar),
    "nar": (NarOptions, Nar),
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

"""The registries of runners and of ways of writing: a new one is its file, one line here, one YAML and one test."""

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
from pretrain.config import Section, choose, complete

__all__ = ["REGISTRY", "WRITING", "Runner", "build", "decoding", "way", "ways", "with_modes"]

Registry = dict[str, tuple[type[Section], Callable[..., Runner]]]
# Each of these tunes for one `--mode` of `generate`.
ALONE: Registry = {
    "ar": (ArOptions, Ar),
    "nar": (NarOptions, Nar),
    "hard_exit": (HardExitRunnerOptions, HardExitRunner),
    "soft_exit": (SoftExitRunnerOptions, SoftExit),
}
REGISTRY: Registry = {**ALONE, "janus": (JanusRunnerOptions, Janus)}
WRITING: Registry = {**ALONE, "draft": (DraftOptions, Draft)}


def build(options: Mapping[str, Any], description: Description) -> Runner:
    """The runner that `options["name"]` names, for a bundle.

    Raises:
        ConfigError: the name or an option is unknown or out of range.
    """
    chosen, make = choose(REGISTRY, options, "runner")
    return make(chosen, description)


def way(mode: str, options: Mapping[str, Any], description: Description) -> Runner:
    """What writes in a `--mode` with these options of its decoder; raises ConfigError as `build` does."""
    chosen, make = choose(WRITING, {"name": mode, "decoding": dict(options)}, "runner")
    return make(chosen, description)


def decoding(mode: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` of the decoder of a `--mode` with the default of each that was not given; raises as `way` does."""
    found: dict[str, Any] = complete(WRITING, {"name": mode, "decoding": dict(options)}, "runner")["decoding"]
    return found


def ways(name: str, runner: Runner) -> dict[str, Runner]:
    """{`--mode` of `generate`: what writes so} of everything that the runner of that name tunes for."""
    return dict(runner.ways) if isinstance(runner, Janus) else {name: runner}

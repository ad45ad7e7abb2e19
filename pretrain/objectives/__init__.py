"""The registry of objectives: a new one is its file, one line here, one YAML and one test."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pretrain.config import ModelConfig, Section, choose
from pretrain.models.ids import SpecialIds
from pretrain.objectives.base import Example, LossSums, Objective, ObjectiveModule, Preview
from pretrain.objectives.cmlm import Cmlm, CmlmOptions
from pretrain.objectives.cmlm_corr import CmlmCorr, CmlmCorrOptions
from pretrain.objectives.denoise import Denoise, DenoiseOptions
from pretrain.objectives.hard_exit import HardExit, HardExitOptions
from pretrain.objectives.janus import Janus, JanusOptions
from pretrain.objectives.lplm import Lplm, LplmOptions
from pretrain.objectives.rdrop import RDrop, RDropOptions
from pretrain.objectives.soft_exit import SoftExit, SoftExitOptions

__all__ = ["Example", "LossSums", "Objective", "ObjectiveModule", "Preview", "build"]

REGISTRY: dict[str, tuple[type[Section], Callable[..., Objective]]] = {
    "janus": (JanusOptions, Janus),
    "cmlm": (CmlmOptions, Cmlm),
    "cmlm_corr": (CmlmCorrOptions, CmlmCorr),
    "rdrop": (RDropOptions, RDrop),
    "denoise": (DenoiseOptions, Denoise),
    "lplm": (LplmOptions, Lplm),
    "hard_exit": (HardExitOptions, HardExit),
    "soft_exit": (SoftExitOptions, SoftExit),
}


def build(options: Mapping[str, Any], ids: SpecialIds, word_starts: np.ndarray | None, model: ModelConfig) -> Objective:
    """Makes the objective that `options["name"]` names.

    Args:
        options: the `objective` section of a configuration.
        word_starts: bool [vocabulary], True where a token begins a word; None if the tokenizer cannot tell.
        model: shape of the model that is trained: its layers, and the classes of its length predictor.

    Raises:
        ConfigError: if the name or an option is unknown or out of range.
    """
    chosen, make = choose(REGISTRY, options, "objective")
    return make(chosen, ids, word_starts, model)

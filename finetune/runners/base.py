"""What a runner is: how a bundle is tuned for one way of writing, and how it then writes."""

from dataclasses import replace
from typing import Any, Protocol

from finetune.decoding import Generated
from pretrain.bundles.description import Description, Mode
from pretrain.config import ModelConfig
from pretrain.models import EncoderDecoder, SourceRows


class Runner(Protocol):
    """Training objective and decoder of one way of writing.

    objective: options for `pretrain.objectives.build`. modes: what a bundle tuned with it can do. model: the model that
    it tunes, which may have parameters that the bundle lacks.
    """

    objective: dict[str, Any]
    modes: tuple[Mode, ...]
    model: ModelConfig

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        """The texts of packed sources; where a runner tunes for several ways of writing, in the first of them."""
        ...


def with_modes(description: Description, runner: Runner) -> Description:
    """The description of a bundle after tuning: same layout, the runner's model, objective and modes."""
    return replace(description, model=runner.model, modes=runner.modes, objective=runner.objective)

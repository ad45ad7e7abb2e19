"""What a runner is: how a bundle is tuned for one way of writing, and how it then writes."""

from dataclasses import replace
from typing import Any, Protocol

from finetune.decoding import Generated
from pretrain.bundles.description import Description, Mode
from pretrain.models import EncoderDecoder, SourceRows


class Runner(Protocol):
    """Training objective and decoder of one way of writing.

    objective: options for `pretrain.objectives.build`. modes: what a bundle tuned with it can do.
    """

    objective: dict[str, Any]
    modes: tuple[Mode, ...]

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        """The texts of packed sources."""
        ...


def with_modes(description: Description, runner: Runner) -> Description:
    """The description of a bundle after tuning: same model and layout, the runner's objective and modes."""
    return replace(description, modes=runner.modes, objective=runner.objective)

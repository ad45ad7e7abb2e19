"""Writing by CUDA graphs: the same texts as a runner's, its decoder in fixed shapes where there is such a form.

Self-drafting and sampling have none. A draft is as long as what was accepted, and a sample's random numbers are drawn
on the host.
"""

from collections.abc import Callable

from finetune.decoding import Generated
from finetune.decoding.beam_static import StaticBeamSearch, supports
from finetune.decoding.graphs import PaddedSources
from finetune.decoding.hard_exit_static import StaticHardExit
from finetune.decoding.mask_predict_static import StaticMaskPredict
from finetune.decoding.soft_exit_static import StaticSoftExit
from finetune.runners.ar import Ar
from finetune.runners.base import Runner
from finetune.runners.hard_exit import HardExitRunner
from finetune.runners.nar import Nar
from finetune.runners.soft_exit import SoftExit
from pretrain.models import EncoderDecoder, SourceRows

# Tokens of a padded batch of sources. A larger one keeps a GPU busy while Python starts the next operation, and packed
# rows spare it the padding.
MOST_ROWS = 8192
NO_GRAPHS = "there is no form for CUDA graphs of this mode with these options"


class ByGraphs:
    """A runner that writes small batches by `write`, and others as it always does."""

    def __init__(self, runner: Runner, write: Callable[[SourceRows], Generated]) -> None:
        self.runner, self.write = runner, write
        self.objective, self.modes, self.model = runner.objective, runner.modes, runner.model

    def generate(self, model: EncoderDecoder, source: SourceRows) -> Generated:
        """model: the one that `write` belongs to."""
        if not source.n_samples:
            return self.runner.generate(model, source)
        sources, width = PaddedSources.shape(source)
        return self.write(source) if sources * width <= MOST_ROWS else self.runner.generate(model, source)


def by_graphs(runner: Runner, model: EncoderDecoder) -> Runner:
    """A runner that writes by graphs of this model, or `runner` itself where there is no form for it."""
    match runner:
        case Nar():
            return ByGraphs(runner, StaticMaskPredict(model, runner.decoding))
        case Ar() if supports(runner.options.decoding):
            return ByGraphs(runner, StaticBeamSearch(model, runner.layout, runner.stream, runner.options.decoding))
        case SoftExit():
            return ByGraphs(runner, StaticSoftExit(model, runner.first_row, runner.decoding))
        case HardExitRunner():
            return ByGraphs(runner, StaticHardExit(model, runner.first_row, runner.decoding))
    return runner

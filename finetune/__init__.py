"""From a hand-off bundle to a tuned model, texts and scores. Imports `pretrain`, never the other way round.

    from finetune import load

    writer = load("runs/stdlib-summaries-ar/bundle")
    texts = writer.generate(["Some source.", "Another one."], mode="ar", beam=5, n_best=2)

Options are those of `python -m finetune generate`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.writer import Writer

__all__ = ["load"]


def load(bundle: str | Path, device: str = "auto") -> "Writer":
    """The bundle, ready to write; see `finetune.writer.Writer`, which also names the errors."""
    from finetune.writer import Writer  # brings torch, which `import finetune` does without

    return Writer(bundle, device)

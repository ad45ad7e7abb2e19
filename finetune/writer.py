"""A bundle that writes: what `finetune.load` returns, and what `generate` on the command line is made of."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import runners
from finetune.generate import NEEDS, Written, check_mode, device_named, write_texts
from finetune.runners import Runner
from finetune.runners.by_graphs import by_graphs
from pretrain.bundles.bundle import load_bundle
from pretrain.errors import UsageError

BATCH_TOKENS = 4096


class Writer:
    """A bundle on a device, every bit and its golden logits checked.

    path: where it lies. modes: those of `generate --mode` that it can write in. description, tokenizer, provenance:
    what the bundle says about itself.

    Args:
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
        eager: do without CUDA graphs on a GPU.

    Raises:
        CheckpointError: no bundle, or one that is not as it was written.
        UsageError: there is no such device.
    """

    def __init__(self, bundle: str | Path, device: str = "auto", eager: bool = False) -> None:
        read = load_bundle(bundle)
        self.path, self.device = str(bundle), device_named(device)
        self.description, self.tokenizer, self.provenance = read.description, read.tokenizer, read.provenance
        self.model = read.model.to(self.device)
        self.eager = eager
        self._last: tuple[Any, Runner] | None = None  # what writes by graphs, for they are dear
        self.modes = tuple(mode for mode in NEEDS if self._can(mode, {}) or self._can(mode, {"rows": "predicted"}))

    @property
    def graphs(self) -> bool:
        """Whether it writes by CUDA graphs where a mode has a form for them."""
        return self.device.type == "cuda" and not self.eager

    def generate(
        self,
        texts: Sequence[str],
        mode: str | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
        dedup: bool = False,
        **options: Any,
    ) -> list[str]:
        """The text that the bundle writes for each of `texts`, in their order.

        Args:
            mode: one of `modes`; may be left out where there is only one.
            batch_tokens: source tokens of a batch at most.
            dedup: leave out a token equal to the one before it.
            options: of the mode's decoder, as on the command line with `_` for `-`: `beam=5`, `iterations=4`, ... With
                `n_best=N` there are N texts a source, one behind the other, best first.

        Raises:
            UsageError: the bundle cannot write in `mode`.
            ConfigError: an option is unknown or out of range.
            TypeError: `texts` is no sequence of strings.
        """
        return self.write(texts, self.runner(mode, options), batch_tokens, dedup).texts

    def write(
        self,
        texts: Sequence[str],
        runner: Runner,
        batch_tokens: int = BATCH_TOKENS,
        dedup: bool = False,
        first: int = 0,
        told: Callable[[int], None] | None = None,
    ) -> Written:
        """As `generate`, with scores and what it took. runner: from `runner`. first, told: as in `write_texts`."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("`texts` must be a sequence of strings")
        if batch_tokens < 1:
            raise UsageError(f"`batch_tokens` must be at least 1, got {batch_tokens}")
        longest = self.description.longest_source
        return write_texts(self.model, self.tokenizer, runner, texts, longest, batch_tokens, dedup, first, told)

    def runner(self, mode: str | None, options: Mapping[str, Any]) -> Runner:
        """What writes in `mode` with these options; raises as `generate` does."""
        if mode is None and len(self.modes) == 1:
            mode = self.modes[0]
        if mode not in NEEDS:
            raise UsageError(f"`mode` must be one of {', '.join(self.modes)} with `{self.path}`, got {mode!r}")
        check_mode(self.description, self.path, mode, options)
        if not self.graphs:
            return runners.way(mode, options, self.description)
        key = mode, dict(options)
        if self._last is None or self._last[0] != key:
            self._last = key, by_graphs(runners.way(mode, options, self.description), self.model)
        return self._last[1]

    def _can(self, mode: str, options: Mapping[str, Any]) -> bool:
        try:
            check_mode(self.description, self.path, mode, options)
        except UsageError:
            return False
        return True

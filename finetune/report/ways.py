"""The ways in which a run's bundle is asked to write: each mode it has, at each setting that papers report."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from finetune import runners
from finetune.report.record import Record
from finetune.runners import Runner
from finetune.runners.hard_exit import HardExitRunner
from finetune.writer import Writer
from pretrain.bundles.bundle import content_sha256
from pretrain.errors import UsageError

BEAMS, ITERATIONS = (1, 5), (0, 1, 4, 10)  # of the tables of JANUS and of mask-predict
# Of a run's own options of writing, those that `generate` takes. What a mode is measured at is not among them.
OWN = {
    "ar": ("length_penalty", "no_repeat_ngram", "max_length"),
    "nar": ("length_beam", "length_choice", "early_stop", "max_length"),
    "hard_exit": ("threshold", "rows", "test_layers", "max_length"),
    "soft_exit": ("max_length",),
    "draft": ("max_length",),
}


@dataclass(frozen=True)
class Way:
    """One setting of one mode of one run. options: of the decoder, all of them. label: setting alone, for pictures."""

    record: Record
    mode: str
    label: str
    options: Mapping[str, Any]
    runner: Runner
    writer: Writer
    bundle_sha256: str

    @property
    def name(self) -> str:
        """Mode and setting."""
        return f"{self.mode}, {self.label}" if self.label else self.mode

    @property
    def identity(self) -> dict[str, Any]:
        """What decides texts and times, as far as this program decides them."""
        return {
            "bundle": self.bundle_sha256,
            "mode": self.mode,
            "options": dict(self.options),
            "device": self.writer.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    @cached_property
    def key(self) -> str:
        """The same in a few letters."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def command(self) -> str:
        """How `generate` writes so."""
        usual = runners.decoding(self.mode, {})
        swept = {"ar": "beam", "nar": "iterations", "hard_exit": "threshold"}.get(self.mode)
        words = ["python -m finetune generate", str(self.record.bundle), "--mode", self.mode]
        for name, value in self.options.items():
            if value is not None and (value != usual[name] or name == swept):
                words.append(f"--{name.replace('_', '-')}")
                words += [] if value is True else [",".join(map(str, value)) if isinstance(value, list) else str(value)]
        return " ".join([*words, "--batch-tokens 1 --input FILE --output FILE"])


def ways_of(record: Record, writer: Writer, beams: Sequence[int], iterations: Sequence[int]) -> list[Way]:
    """Every way of a run, of one mode beside each other.

    The rest of a mode's options is as the run has it in `runner.decoding`.

    Raises:
        ConfigError: an option is out of range. UsageError: the bundle cannot write yet.
    """
    if not writer.modes:
        modes = ", ".join(writer.description.modes)
        raise UsageError(f"`{record.bundle}` must be able to write, with modes {modes} it cannot: tune it further")
    sha256 = content_sha256(record.bundle)
    found = []
    for mode in writer.modes:
        own = _own(record.provenance, mode)
        swept: list[dict[str, Any]] = {
            "ar": [{"beam": beam} for beam in beams],
            "nar": [{"iterations": count} for count in iterations],
        }.get(mode, [{}])
        for setting in swept:
            runner = writer.runner(mode, own | setting)
            if isinstance(runner, HardExitRunner):
                setting = {"threshold": runner.decoding.threshold}
            options = runners.decoding(mode, own | setting)
            found.append(Way(record, mode, _label(mode, setting), options, runner, writer, sha256))
    return found


def _own(provenance: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """What the run that made the bundle says of writing in `mode`; nothing where it does not."""
    config = provenance.get("config")
    runner = config.get("runner") if isinstance(config, Mapping) else None
    if not isinstance(runner, Mapping) or not isinstance(runner.get("decoding"), Mapping):
        return {}
    own = "ar" if mode == "draft" else mode  # a draft is the text of greedy AR
    decoding = runner["decoding"] if runner.get("name") == own else runner["decoding"].get(own)
    values = decoding if isinstance(decoding, Mapping) else {}
    return {name: values[name] for name in OWN[mode] if values.get(name) is not None}


def _label(mode: str, setting: Mapping[str, Any]) -> str:
    if mode == "nar":
        return f"{setting['iterations']} iteration{'' if setting['iterations'] == 1 else 's'}"
    return " ".join(f"{name} {value:g}" for name, value in setting.items())

"""Rows 1, 2, 3, 10 and 11: JANUS steps over AR's, over the plain reference with dense masks, and behind a real loader.

Forward and backward of one micro-batch without dropout; the optimizer's share is the same for all.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from gpu_harness import Bench, CannotRun, as_good
from harness import Row
from steps import IDS, examples, gradients, reference_step, step
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.cost.flops import batch_flops
from pretrain.cost.peak import device_peak
from pretrain.models import EncoderDecoder
from pretrain.objectives import build
from pretrain.objectives.batch import TokenBatch

BASE = ModelConfig(
    vocab_size=50_265, d_model=768, encoder_layers=6, decoder_layers=6, heads=12, ffn_dim=3072, dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
SMALL = BASE.model_copy(
    update={"vocab_size": 8192, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "heads": 2, "ffn_dim": 32}
)
PROFILED = 3


def rows(bench: Bench) -> Iterator[Row]:
    """Equal texts on all sides; half of each target is masked."""
    length, samples, config = (16, 3, SMALL) if bench.small else (512, 16, BASE)
    case = _Case(bench, config, length)
    says = case.check()
    janus, ar, plain = case.janus(samples), case.ar(samples), case.reference(samples)
    shape = f"base size, S=T={length}, B={samples}, bf16, dropout 0; {says}"
    pair, dense = bench.times([janus, ar]), bench.times([plain, janus])
    yield pair.ratio("1 JANUS step / AR step", 0, 1, 2.6, False, shape)
    yield dense.ratio("2 dense-mask reference / packed JANUS step", 0, 1, 3.0, True, shape)
    name = "3 peak memory of one more sentence: reference / packed"
    try:
        few, more = max(1, samples // 4), max(2, samples // 2)
        slopes = [
            (bench.peak_bytes(make(more)) - bench.peak_bytes(make(few))) / (more - few)
            for make in (case.reference, case.janus)
        ]
        told = f"{slopes[0] / 1e6:.0f} MB over {slopes[1] / 1e6:.0f} MB, from {few} to {more} sentences; {shape}"
        yield Row(name, slopes[0] / slopes[1], 5.0, "min", told)
    except CannotRun as why:
        bench.skip(name, why)
    peak = device_peak(bench.device, "bf16")
    rates = [flops / (1e-3 * ms) for flops, ms in zip(case.flops(samples), pair.milliseconds, strict=True)]
    told = f"{rates[0] / 1e12:.0f} TFLOP/s of products of matrices over {peak.flops / 1e12:.0f}, {peak.source}; {shape}"
    yield Row("10 model FLOP utilisation of the JANUS step", rates[0] / peak.flops, 0.4, "min", told)
    told = f"{rates[0] / 1e12:.0f} over {rates[1] / 1e12:.0f} TFLOP/s; {shape}"
    yield Row("10 utilisation of JANUS / of AR", rates[0] / rates[1], 0.88, "min", told)
    if bench.profile is not None:
        _profile(bench, bench.profile, janus)


class _Case:
    """A model in fp32 for checks and in 16 bits, and the steps of all sides."""

    def __init__(self, bench: Bench, config: ModelConfig, length: int) -> None:
        self.bench, self.config, self.length = bench, config, length
        torch.manual_seed(0)
        self.precise = EncoderDecoder(config, IDS, backend=bench.backend).to(bench.device).train()
        self.model = copy.deepcopy(self.precise).to(bench.dtype)
        self.objective = build({"name": "janus"}, IDS, None, config)
        self.denoise = build({"name": "denoise", "ar_layout": "bos_first"}, IDS, None, config)
        self.kept: dict[Any, Tensor] = {}

    def given(self, samples: int) -> list[Any]:
        return examples([self.length] * samples, np.random.default_rng(0))

    def janus(self, samples: int) -> Callable[[], Tensor]:
        batch = self.objective.collate(self.given(samples)).to(self.bench.device)
        return lambda: step(self.model, self.objective, batch)

    def ar(self, samples: int) -> Callable[[], Tensor]:
        batch = self.denoise.collate(self.given(samples)).to(self.bench.device)
        return lambda: step(self.model, self.denoise, batch)

    def reference(self, samples: int, model: EncoderDecoder | None = None) -> Callable[[], Tensor]:
        """The plain reference; its masks are made in the step, as in the released code."""
        given = self.given(samples)
        batch = self.objective.collate(given)

        def run() -> Tensor:
            with on(self.bench.device, self.kept):
                return reference_step(model or self.model, self.objective, batch, given)

        return run

    def check(self) -> str:
        """Loss and all gradients of both, in 16 bits, against the reference in fp32; few sentences."""
        made: list[list[Tensor]] = []
        for run, model in (
            (self.janus(2), self.model),
            (self.reference(2), self.model),
            (self.reference(2, self.precise), self.precise),
        ):
            made.append([run(), gradients(model)])
            model.zero_grad(set_to_none=True)
        ours, theirs, exact = made
        return as_good("the packed step", ours, theirs, exact, floor=1e-2)

    def flops(self, samples: int) -> list[int]:
        """Of one JANUS and of one AR step."""
        both = self.objective.collate(self.given(samples)), self.denoise.collate(self.given(samples))
        return [batch_flops(self.config, batch).training for batch in both]


@contextmanager
def on(device: torch.device, kept: dict[Any, Tensor]) -> Iterator[None]:
    """Inside, the plain reference, which makes its tensors on the CPU, makes them on `device`.

    Token ids are copied once, as those of the packed batch are.
    """
    if device.type == "cpu":
        yield
        return
    from_numpy = torch.from_numpy

    def fetch(array: np.ndarray) -> Tensor:
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in kept:
            kept[key] = from_numpy(array).to(device)
        return kept[key]

    with torch.device(device), mock.patch.object(torch, "from_numpy", fetch):
        yield


def _profile(bench: Bench, folder: Path, run: Callable[[], object]) -> None:
    """Where the time of a JANUS step goes: a table of kernels and a trace for chrome://tracing."""
    from torch.profiler import ProfilerActivity, profile

    folder.mkdir(parents=True, exist_ok=True)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profile(activities=kinds) as found:
        for _ in range(PROFILED):
            run()
        if bench.cuda:
            torch.cuda.synchronize(bench.device)
    order = "self_cuda_time_total" if bench.cuda else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
    (folder / "janus_step.txt").write_text(table + "\n", encoding="utf-8")
    found.export_chrome_trace(str(folder / "janus_step.json.gz"))


def loader_rows(bench: Bench) -> Iterator[Row]:
    """Row 11, on Python's own documentation: as many steps in a row from shards as from batches on the device."""
    from data import LENGTH, MICRO_TOKENS, VOCABULARY, _documents

    from pretrain.data.dataset import ShardDataset
    from pretrain.data.plan import BatchSize
    from pretrain.data.prepare import prepare
    from pretrain.data.stream import SampleStream, ShardCorpus

    vocabulary, micro, steps, workers = (512, 512, 1, 0) if bench.small else (VOCABULARY, MICRO_TOKENS, 24, 2)
    documents = [Path(__file__).read_text(encoding="utf-8")] if bench.small else _documents()
    with tempfile.TemporaryDirectory() as place:
        folder, text = Path(place), Path(place) / "text.txt"
        text.write_text("\n\n".join(documents), encoding="utf-8")
        prepare(folder / "shards", [f"docs=text:{text}"], train_vocab=vocabulary, max_length=LENGTH)
        dataset = ShardDataset(folder / "shards")
        tokenizer = dataset.tokenizer
        base = SMALL if bench.small else BASE
        config = base.model_copy(update={"vocab_size": tokenizer.vocab_size})
        objective = build({"name": "janus"}, tokenizer.ids, tokenizer.word_starts, config)
        torch.manual_seed(0)
        model = EncoderDecoder(config, tokenizer.ids, backend=bench.backend).to(bench.device, bench.dtype).train()
        size = BatchSize(samples=None, tokens=micro, micro_max_tokens=micro)

        def stream(workers: int) -> SampleStream:
            return SampleStream(ShardCorpus(dataset, "train"), objective, seed=1, batch=size, workers=workers)

        with closing(stream(0).windows(0, 0, 1)) as windows:
            cached = [_on(bench, batch) for window in islice(windows, steps) for batch in window.batches]

        def from_device() -> None:
            for batch in cached:
                step(model, objective, batch)

        with closing(stream(workers).windows(0, 0, 1)) as windows:

            def from_shards() -> None:
                for window in islice(windows, steps):
                    for batch in window.batches:
                        step(model, objective, _on(bench, batch))

            times = bench.times([from_shards, from_device], repeats=5)
    told = f"{steps} steps of {micro} target tokens, {workers} workers, base size, V={config.vocab_size}"
    yield times.ratio("11 step with the loader / step on cached batches", 0, 1, 1.01, False, told)


def _on(bench: Bench, batch: object) -> TokenBatch:
    """A batch of the stream, which promises less than the objective has made, on the device."""
    assert isinstance(batch, TokenBatch)
    return batch.to(bench.device)

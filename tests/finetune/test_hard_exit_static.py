"""Hard exit in fixed shapes writes what `hard_exit` writes, and lets tokens leave where it does."""

from typing import Any

import pytest
import torch

from finetune.decoding.hard_exit import HardExitDecoding, hard_exit
from finetune.decoding.hard_exit_static import StaticHardExit
from pretrain.errors import ConfigError
from pretrain.models.patterns import FirstRow
from pretrain.models.rows import to_device
from tests.finetune.models import pack, some_sources, tiny_model
from tests.finetune.tape import Tape, same, taped, tensors

BATCHES = [(3, 8, 5, 5, 12), (7,), (9, 2, 14), (4,), (13,)]
SOME, ALL = 2.3, 100.0  # thresholds at which some of these models' tokens leave early, and all


@pytest.mark.parametrize(
    ("first_row", "options", "changes"),
    [
        ("mask", {"threshold": SOME, "max_length": 10}, {"decoder_layers": 3}),
        ("bos", {"threshold": SOME, "rows": "predicted"}, {"decoder_layers": 3, "norm": "pre"}),
        ("mask", {"threshold": SOME, "test_layers": [2]}, {"decoder_layers": 4, "off_ramps": "separate"}),
        ("mask", {"threshold": 0.0, "max_length": 9}, {"embed_scale": True}),
        ("mask", {"threshold": ALL, "test_layers": [2]}, {"decoder_layers": 4}),
    ],
)
def test_it_writes_what_hard_exit_writes(
    monkeypatch: pytest.MonkeyPatch, first_row: FirstRow, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    replays, written, layers = taped(monkeypatch), 0, set()
    model, decoding = tiny_model(**changes), HardExitDecoding(**options)
    write = StaticHardExit(model, first_row, decoding)
    for number, batch in enumerate(BATCHES):
        source = pack(some_sources(batch, seed=number))
        made, wanted = write(source), hard_exit(model, source, first_row, decoding)
        same(made, wanted)
        assert made.exits and wanted.exits and made.exits.tokens == wanted.exits.tokens
        assert made.exits.flops >= wanted.exits.flops
        written += sum(map(len, made.tokens))
        layers |= {layer for layer, count in enumerate(made.exits.tokens, start=1) if count}
    assert replays and written > 50
    last = model.config.decoder_layers
    assert len(layers) > 1 if options["threshold"] == SOME else layers == {last if options["threshold"] == 0.0 else 2}


def test_layers_that_nobody_reaches_do_not_run() -> None:
    write = StaticHardExit(tiny_model(decoder_layers=4), "mask", HardExitDecoding(threshold=ALL, max_length=9))
    made = write(pack(some_sources((3, 5))))
    (passed,) = write.shapes.made.values()
    assert [run.calls for _, run in passed.runs] == [1, 0, 0, 0]
    all_layers = StaticHardExit(tiny_model(decoder_layers=4), "mask", HardExitDecoding(threshold=0.0, max_length=9))
    other = all_layers(pack(some_sources((3, 5)))).exits
    assert made.exits and other and made.exits.tokens[1:] == (0, 0, 0) and 2 * made.exits.flops < other.flops


def test_the_graphs_need_nothing_of_the_host() -> None:
    """On `meta`, where nothing has a value and a tensor of the host cannot be read."""
    with torch.device("meta"), torch.no_grad():
        write = StaticHardExit(tiny_model(), "mask", HardExitDecoding(threshold=SOME))
        made = write.shapes(3, 16)
        with Tape() as tape:
            for graph in (made.read, made.begin, *(run for _, run in made.runs)):
                graph.run()
    assert {x.device.type for _, *used in tape.launches for x in tensors(used)} == {"meta"}


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="64 positions, got 65"):
        StaticHardExit(tiny_model(), "mask", HardExitDecoding(max_length=65))
    with pytest.raises(ConfigError, match="`test_layers` must be layers from 1 to 1, got 2"):
        StaticHardExit(tiny_model(), "mask", HardExitDecoding(test_layers=[2]))
    assert StaticHardExit(tiny_model(), "mask", HardExitDecoding())(pack([])).tokens == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", ["fixed", "predicted"])
def test_graphs_on_a_gpu(rows: Any) -> None:
    model = tiny_model(decoder_layers=4).cuda()
    options = HardExitDecoding(threshold=SOME, max_length=20, rows=rows)
    write = StaticHardExit(model, "mask", options)
    for batch in BATCHES * 3:
        source = to_device(pack(some_sources(batch)), torch.device("cuda"))
        made, wanted = write(source), hard_exit(model, source, "mask", options)
        same(made, wanted)
        assert made.exits and wanted.exits and made.exits.tokens == wanted.exits.tokens

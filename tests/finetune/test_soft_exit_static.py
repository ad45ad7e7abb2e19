"""Soft exit in fixed shapes writes what `soft_exit` writes, also when its recorded operations are repeated."""

from typing import Any

import pytest
import torch

from finetune.decoding.soft_exit import SoftExitDecoding, soft_exit
from finetune.decoding.soft_exit_static import StaticSoftExit
from pretrain.errors import ConfigError
from pretrain.models.patterns import FirstRow
from pretrain.models.rows import to_device
from tests.finetune.models import pack, some_sources, tiny_model
from tests.finetune.tape import Tape, same, taped, tensors

BATCHES = [(3, 8, 5, 5, 12), (7,), (9, 2, 14), (4,), (13,)]


@pytest.mark.parametrize(
    ("first_row", "longest", "changes"),
    [
        ("mask", 10, {}),
        ("bos", 9, {"off_ramps": "separate", "decoder_layers": 3, "norm": "pre"}),
        ("mask", None, {"embed_scale": True}),
    ],
)
def test_it_writes_what_soft_exit_writes(
    monkeypatch: pytest.MonkeyPatch, first_row: FirstRow, longest: int | None, changes: dict[str, Any]
) -> None:
    replays, written = taped(monkeypatch), 0
    model, options = tiny_model(soft_exit=True, **changes), SoftExitDecoding(max_length=longest)
    write = StaticSoftExit(model, first_row, options)
    for number, batch in enumerate(BATCHES):
        source = pack(some_sources(batch, seed=number))
        made = write(source)
        same(made, soft_exit(model, source, first_row, options))
        written += sum(map(len, made.tokens))
    assert replays and written > 50


def test_the_pass_needs_nothing_of_the_host() -> None:
    """On `meta`, where nothing has a value and a tensor of the host cannot be read."""
    with torch.device("meta"), torch.no_grad():
        write = StaticSoftExit(tiny_model(soft_exit=True), "mask", SoftExitDecoding())
        made = write.shapes(3, 16)
        with Tape() as tape:
            made.write.run()
    assert {x.device.type for _, *used in tape.launches for x in tensors(used)} == {"meta"}


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="64 positions, got 65"):
        StaticSoftExit(tiny_model(soft_exit=True), "mask", SoftExitDecoding(max_length=65))
    assert StaticSoftExit(tiny_model(soft_exit=True), "mask", SoftExitDecoding())(pack([])).tokens == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu() -> None:
    model, options = tiny_model(soft_exit=True).cuda(), SoftExitDecoding(max_length=20)
    write = StaticSoftExit(model, "mask", options)
    for batch in BATCHES * 3:
        source = to_device(pack(some_sources(batch)), torch.device("cuda"))
        same(write(source), soft_exit(model, source, "mask", options))

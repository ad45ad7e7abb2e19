"""Beam search in fixed shapes writes what `beam_search` writes, also when its recorded operations are repeated."""

from typing import Any

import pytest
import torch

from finetune.decoding import ArDecoding, beam_search
from finetune.decoding.beam_static import StaticBeamSearch, supports
from pretrain.errors import ConfigError
from pretrain.models.incremental import StreamName
from pretrain.models.patterns import ArLayout, Layout
from pretrain.models.rows import to_device
from tests.finetune.models import IDS, pack, some_sources, tiny_model
from tests.finetune.tape import Tape, same, taped, tensors
from tests.finetune.test_beam import favour_eos

BATCHES = [(3, 8, 5, 5, 12), (7,), (9, 2, 14)]


@pytest.mark.parametrize(
    ("start", "stream", "changes", "model_changes"),
    [
        ("bos_first", "query", {"beam": 1}, {}),
        ("eos_first", "query", {"beam": 3, "n_best": 2, "length_penalty": 0.0}, {}),
        ("eos_first", "content", {"beam": 4, "n_best": 4, "length_penalty": 2.0}, {"norm": "pre", "decoder_layers": 1}),
        ("eos_first", "content", {"beam": 6}, {"vocab": 8, "positions": "sinusoidal"}),
    ],
)
def test_it_writes_what_beam_search_writes(
    monkeypatch: pytest.MonkeyPatch,
    start: Layout,
    stream: StreamName,
    changes: dict[str, Any],
    model_changes: dict[str, Any],
) -> None:
    replays, lengths = taped(monkeypatch), set()
    model, layout = tiny_model(**model_changes), ArLayout.aligned(start, IDS)
    favour_eos(model)
    options = ArDecoding(max_length=11, **changes)
    write = StaticBeamSearch(model, layout, stream, options)
    for number, batch in enumerate(BATCHES):
        source = pack(some_sources(batch, model.config.vocab_size or 0, seed=number))
        made = write(source)
        same(made, beam_search(model, source, layout, stream, options))
        lengths |= {len(tokens) for tokens in made.tokens}
    assert len(replays) > 2
    assert len(lengths) > 1 or model.config.vocab_size == 8  # three words leave little to say


def test_it_stops_one_token_behind_the_last_that_ends() -> None:
    model, layout, options = tiny_model(), ArLayout.aligned("eos_first", IDS), ArDecoding(beam=1, max_length=13)
    favour_eos(model)
    model.head.bias_V *= 20.0
    write, source = StaticBeamSearch(model, layout, "content", options), pack(some_sources())
    made = write(source)
    same(made, beam_search(model, source, layout, "content", options))
    (search,) = write.searches.made.values()
    assert made.passes == 2 and search.advance.calls == 2  # EOS is forced as content, BOS written behind it


def test_a_token_needs_nothing_of_the_host() -> None:
    """On `meta`, where nothing has a value and a tensor of the host cannot be read."""
    with torch.device("meta"), torch.no_grad():
        write = StaticBeamSearch(tiny_model(), ArLayout.aligned("eos_first", IDS), "query", ArDecoding())
        search = write.searches(3, 16)
        with Tape() as tape:
            search.begin.run()
            search.advance.run()
    assert {x.device.type for _, *used in tape.launches for x in tensors(used)} == {"meta"}


def test_bad_input() -> None:
    model, layout = tiny_model(), ArLayout.aligned("bos_first", IDS)
    with pytest.raises(ConfigError, match="64 positions, got 65"):
        StaticBeamSearch(model, layout, "query", ArDecoding(max_length=65))
    assert StaticBeamSearch(model, layout, "query", ArDecoding(n_best=2))(pack([])).n_best == 2
    assert supports(ArDecoding(beam=16))
    assert not any(map(supports, (ArDecoding(beam=17), ArDecoding(sample=True), ArDecoding(no_repeat_ngram=3))))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu() -> None:
    model, layout = tiny_model().cuda(), ArLayout.aligned("eos_first", IDS)
    options = ArDecoding(beam=3, max_length=13, n_best=2)
    write = StaticBeamSearch(model, layout, "query", options)
    for batch in BATCHES * 3:
        source = to_device(pack(some_sources(batch)), torch.device("cuda"))
        same(write(source), beam_search(model, source, layout, "query", options))

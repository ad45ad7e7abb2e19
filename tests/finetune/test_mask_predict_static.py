"""Mask-predict in fixed shapes writes what the packed form writes, also when its recorded operations are repeated."""

from typing import Any

import pytest
import torch

from finetune.decoding import MaskPredictOptions, graphs, mask_predict, mask_predict_static
from finetune.decoding.graphs import PaddedSources, Shapes, bucket
from finetune.decoding.mask_predict_static import StaticMaskPredict
from pretrain.errors import ConfigError
from pretrain.models.rows import to_device
from tests.finetune.models import pack, some_sources, tiny_model
from tests.finetune.tape import Tape, same, taped, tensors

BATCHES = [(3, 8, 5, 5, 12), (7,), (9, 2, 14, 1, 6), (4,), (13,)]


OTHER = {"norm": "pre", "positions": "sinusoidal", "max_positions": 30}


@pytest.mark.parametrize(
    ("changes", "model_changes", "fewest"),
    [
        ({"iterations": 0}, {}, 2),
        ({"iterations": 4, "length_beam": 1}, OTHER, 2),
        ({"iterations": 4, "length_choice": "topk", "early_stop": True}, {}, 2),
        ({"iterations": 2}, OTHER, 16),
        ({"iterations": 9, "rewrite": "all", "early_stop": True, "length_beam": 2}, {}, 16),
    ],
)
def test_it_writes_what_mask_predict_writes(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], model_changes: dict[str, Any], fewest: int
) -> None:
    replays, lengths = taped(monkeypatch), set()
    monkeypatch.setattr(mask_predict_static, "FEWEST_TOKENS", fewest)
    model = tiny_model(seed=1, **model_changes)
    options = MaskPredictOptions(max_length=28, **changes)
    write = StaticMaskPredict(model, options)
    for number, batch in enumerate(BATCHES * 2):
        source = pack(some_sources(batch, seed=number))
        made = write(source)
        same(made, mask_predict(model, source, options))
        lengths |= {len(tokens) for tokens in made.tokens}
    assert len(replays) > 2 and len(lengths) > 1
    few = [
        width < one.columns
        for all_of in write.reading.made.values()
        for one in all_of.candidates.made.values()
        for (width,) in one.later.made
    ]
    assert any(few) == (fewest == 2 and options.iterations > 0 and options.rewrite != "all")


def test_what_a_shape_held_before_changes_no_bit() -> None:
    """Long sources, then short ones in the same buffers; and both alone, in buffers that are new."""
    model, options = tiny_model(seed=3), MaskPredictOptions(iterations=3, max_length=20)
    used = StaticMaskPredict(model, options)
    for batch in ((12, 11, 13), (2, 3, 1)):
        source = pack(some_sources(batch))
        old, new = used(source), StaticMaskPredict(model, options)(source)
        assert old.scores == new.scores and [list(x) for x in old.tokens] == [list(x) for x in new.tokens]


def test_positions_behind_a_text_are_never_read() -> None:
    """NaN stands at every position that padding alone has."""
    model, options = tiny_model(), MaskPredictOptions(iterations=2, max_length=9, length_beam=2)
    sources = some_sources((3, 8))
    expected = mask_predict(model, pack(sources), options)
    with torch.no_grad():
        model.encoder.embed_positions.weight[2 + 10 :] = torch.nan
        model.decoder.embed_positions.weight[2 + 9 :] = torch.nan
    same(StaticMaskPredict(model, options)(pack(sources)), expected)


def test_a_pass_needs_nothing_of_the_host() -> None:
    """On `meta`, where nothing has a value and a tensor of the host cannot be read."""
    with torch.device("meta"), torch.no_grad():
        model = tiny_model()
        write = StaticMaskPredict(model, MaskPredictOptions(early_stop=True))
        reading = write.reading(3, 16)
        candidates = reading.candidates(2, 24)
        with Tape() as tape:
            for run in (reading._read, candidates._first, candidates._rewrite, candidates.later(16).run):
                run()
    assert {x.device.type for _, *used in tape.launches for x in tensors(used)} == {"meta"}


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="64 positions, got 65"):
        StaticMaskPredict(tiny_model(), MaskPredictOptions(max_length=65))
    assert StaticMaskPredict(tiny_model(), MaskPredictOptions())(pack([])).tokens == []


def test_buckets() -> None:
    assert [bucket(n) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [bucket(n, 16) for n in (0, 1, 16, 17, 24, 25, 33, 49)] == [16, 16, 16, 24, 24, 32, 48, 64]
    assert all(n <= bucket(n, 16) < max(17, 1.5 * n) for n in range(1, 3000))
    assert PaddedSources.shape(pack(some_sources((3, 15, 4, 4, 4)))) == (6, 24)


def test_only_the_shapes_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    shapes = Shapes(lambda *shape: made.append(shape), lambda one, other: one * other)
    monkeypatch.setattr(graphs, "KEPT", 2)
    for shape in ((1, 1), (2, 2), (1, 1), (3, 3), (1, 1), (2, 2)):
        shapes(*shape)
    assert made == [(1, 1), (2, 2), (3, 3), (2, 2)]
    monkeypatch.setattr(graphs, "MOST_BYTES", 4)
    shapes(1, 3)
    assert list(shapes.made) == [(1, 3)]
    shapes(1, 1)
    assert list(shapes.made) == [(1, 3), (1, 1)]
    shapes(9, 9)
    assert list(shapes.made) == [(9, 9)]


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[:, [0, 1]],
        lambda x: x + torch.tensor([1.0, 2.0]),
    ],
)
def test_the_tape_refuses_what_a_graph_cannot_hold(bad: Any) -> None:
    with pytest.raises(AssertionError, match="cannot hold"), Tape():
        bad(torch.ones(2, 2))


def test_the_tape_repeats_the_numbers_of_the_recording() -> None:
    x, total, step = torch.zeros(2), torch.zeros(2), 1.0
    with Tape() as tape:
        total.copy_((x + step).view(2) * 2)
    x.fill_(3.0)
    step = 100.0
    tape.replay()
    assert total.tolist() == [8.0, 8.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu() -> None:
    model, options = tiny_model(seed=1).cuda(), MaskPredictOptions(iterations=4, max_length=28)
    write = StaticMaskPredict(model, options)
    for batch in (*BATCHES, *BATCHES, *BATCHES):
        there = to_device(pack(some_sources(batch)), torch.device("cuda"))
        same(write(there), mask_predict(model, there, options))

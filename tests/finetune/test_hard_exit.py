"""Hard exits: the skipping decoder equals one that computes everything and copies with `torch.where`."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from finetune import runners
from finetune.decoding import HardExitDecoding, hard_exit
from finetune.decoding.common import most_likely
from pretrain.bundles.description import Description
from pretrain.cost.flops import decoder_flops
from pretrain.errors import ConfigError
from pretrain.models import EncoderDecoder, Stream, encoder_decoder, pack_streams
from pretrain.models.early_exit import ExitRule, ParallelRows, off_ramp, plan_exits, write_early
from pretrain.models.patterns import ArLayout, FirstRow, mask_rows
from tests.finetune.models import IDS, pack, some_sources, tiny_model

VOCAB, LAYERS = 40, 4
BANNED = [IDS.bos, IDS.pad, IDS.mask, IDS.unk]
LENGTHS = [7, 1, 9, 4, 12]


def deep_model(**changes: object) -> EncoderDecoder:
    """Entropies of random weights spread over the whole range, so that every layer keeps some rows and loses some."""
    return tiny_model(VOCAB, decoder_layers=LAYERS, **{"init_std": 0.5, **changes})


def stream(n: int, first: FirstRow, memory: tuple[int, int]) -> Stream:
    return Stream(mask_rows(n, IDS, first), np.arange(n), [(n, n, 0, 0, 0, 0)], memory, (0, n), np.zeros(n), 0)


@torch.no_grad()
def reference(
    model: EncoderDecoder, source: np.ndarray, n: int, first: FirstRow, threshold: float, layers: tuple[int, ...] | None
) -> tuple[list[int], list[int], list[float]]:
    """One text by the definition: every layer computes every row, then the copied states are put back."""
    memory = model.encode(pack([source]))
    rows, _, _ = pack_streams([stream(n, first, (0, len(source)))], len(source))
    x = model.decoder.embed(model.shared(rows.tokens_R) * model.scale, rows.positions_R)
    state, exit_n = torch.zeros_like(x), torch.zeros(n, dtype=torch.int64)
    for number, layer in enumerate(model.decoder.layers, start=1):
        out = layer(x, n, None, memory, rows.self_mask, rows.cross_mask)
        p = model.ramp(number)(model.decoder.layer_norm(out)).softmax(dim=1)
        entropy = torch.special.entr(p).sum(dim=1)
        asked = number < LAYERS and (layers is None or number in layers)
        now = (exit_n == 0) & ((entropy < threshold) if asked else torch.full((n,), number == LAYERS))
        state = torch.where(now[:, None], out, state)
        exit_n = torch.where(now, number, exit_n)
        x = torch.where((exit_n > 0)[:, None], state, out)
    heads = torch.stack([model.ramp(number + 1)(model.decoder.layer_norm(state)) for number in range(LAYERS)])
    log_p = heads[exit_n - 1, torch.arange(n)].log_softmax(dim=1)
    log_p[:, BANNED] = -torch.inf
    best = log_p.max(dim=1)
    return exit_n.tolist(), best.indices.tolist(), best.values.tolist()


@given(
    seed=st.integers(0, 10_000),
    threshold=st.floats(0.0, 4.0),
    first=st.sampled_from(["mask", "bos"]),
    norm=st.sampled_from(["post", "pre"]),
    layers=st.sampled_from([None, (1,), (2, 3)]),
    ramps=st.sampled_from(["shared", "separate"]),
)
def test_it_follows_the_definition(
    seed: int, threshold: float, first: FirstRow, norm: str, layers: tuple[int, ...] | None, ramps: str
) -> None:
    model, sources = deep_model(seed=seed, norm=norm, off_ramps=ramps), some_sources(seed=seed)
    for ramp in model.ramps:
        torch.nn.init.normal_(ramp.get_parameter("weight"), std=0.5)
    packed = pack(sources)
    with torch.no_grad():
        memory = model.encode(packed)
        rows, rule = ParallelRows.pack(model, LENGTHS, packed, first), ExitRule(threshold, layers)
        left = write_early(model, rows, memory, rule, BANNED)
    texts = [reference(model, s, n, first, threshold, layers) for s, n in zip(sources, LENGTHS, strict=True)]
    exits, tokens, log_p = ([x for text in texts for x in text[i]] for i in range(3))
    assert left.exit_R.tolist() == exits and left.token_R.tolist() == tokens
    np.testing.assert_allclose(left.log_p_R, log_p, atol=1e-10)
    assert plan_exits(model, rows, memory, rule).tolist() == exits


def test_exits_spread_over_the_layers() -> None:
    """Else the test above would prove little."""
    model, sources = deep_model(), some_sources()
    packed = pack(sources)
    with torch.no_grad():
        rows = ParallelRows.pack(model, LENGTHS, packed, "mask")
        left = write_early(model, rows, model.encode(packed), ExitRule(2.0), BANNED)
    assert set(left.exit_R.tolist()) == {1, 2, 3, 4}
    rows_of = [work.rows for work in left.work]
    assert rows_of == [int((left.exit_R >= number).sum()) for number in range(1, LAYERS + 1)]
    assert left.scored == sum(rows_of)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_threshold_0_is_the_full_depth_bit_for_bit(norm: str) -> None:
    model, sources = deep_model(norm=norm), some_sources()
    packed = pack(sources)
    streams = [stream(n, "mask", packed.memory_range(index)) for index, n in enumerate(LENGTHS)]
    full, _, _ = pack_streams(streams, packed.mask.n_rows)
    with torch.no_grad():
        memory = model.encode(packed)
        rows = ParallelRows.pack(model, LENGTHS, packed, "mask")
        left = write_early(model, rows, memory, ExitRule(0.0), BANNED)
        h = model.decode(full, memory)
        assert torch.equal(model.decoder.layer_norm(left.state_RD), h)
        assert torch.equal(left.token_R, most_likely(model, h, BANNED)[0])
    assert set(left.exit_R) == {LAYERS} and left.scored == sum(LENGTHS)  # no off-ramp below is asked


def test_above_ln_v_all_leave_at_layer_1_and_no_other_layer_runs() -> None:
    model, calls = deep_model(init_std=1e-4), []  # nearly uniform predictions: the highest entropies there are
    for number, layer in enumerate(model.decoder.layers, start=1):
        layer.get_submodule("encoder_attn.k_proj").register_forward_hook(lambda *_, number=number: calls.append(number))
    packed = pack(some_sources())
    with torch.no_grad():
        memory = model.encode(packed)
        rows = ParallelRows.pack(model, LENGTHS, packed, "mask")
        left = write_early(model, rows, memory, ExitRule(math.log(VOCAB) + 1e-9), BANNED)
        assert set(left.exit_R) == {1} and calls == [1]
        calls.clear()
        plan_exits(model, rows, memory, ExitRule(math.log(VOCAB) + 1e-9))
        assert calls == [1, 2, 3, 4]  # ZeRO-3: the same modules on every rank


@pytest.mark.parametrize("layers", [None, (2,)])
def test_products_are_counted_as_torch_counts_them(layers: tuple[int, ...] | None) -> None:
    """But for those of attention, whose operator the counter does not know on a CPU."""
    model, packed = deep_model(), pack(some_sources())
    with torch.no_grad():
        memory = model.encode(packed)
        rows = ParallelRows.pack(model, LENGTHS, packed, "mask")
        with FlopCounterMode(display=False) as counter:
            left = write_early(model, rows, memory, ExitRule(2.0, layers), BANNED)
    found = counter.get_flop_counts()["Global"]
    linear = sum(count for op, count in found.items() if "addmm" in str(op) or str(op).endswith(".mm"))
    flops = decoder_flops(model.config, left.work, left.scored)
    assert linear == flops.decoder + flops.heads


def test_empty_batches_run_every_module() -> None:
    model, packed = deep_model(), pack([])
    with torch.no_grad():
        rows = ParallelRows.pack(model, [], packed, "mask")
        assert len(plan_exits(model, rows, model.encode(packed), ExitRule(0.5))) == 0
    assert hard_exit(model, packed, "mask", HardExitDecoding()).tokens == []


def test_entropies_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep_model(logits_bias=True)
    h = torch.randn(23, 16, dtype=torch.float64)
    p = model.logits(h).softmax(dim=1)
    whole = off_ramp(model.head, h, BANNED)
    np.testing.assert_allclose(whole.entropy_L, torch.special.entr(p).sum(dim=1).detach(), atol=1e-12)
    seen: list[int] = []
    monkeypatch.setattr(encoder_decoder, "MAX_LOGITS", 3 * VOCAB)
    real = encoder_decoder.linear
    monkeypatch.setattr(encoder_decoder, "linear", lambda x, *rest: seen.append(len(x)) or real(x, *rest))
    parts = off_ramp(model.head, h, BANNED)
    assert max(seen) == 3 and sum(seen) == 23
    for one, two in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert not set(whole.token_L.tolist()) & set(BANNED)
    certain = torch.zeros(1, 16, dtype=torch.float64)
    model.head.bias_V = torch.zeros(VOCAB, dtype=torch.float64)
    model.head.bias_V[7] = 1000.0
    assert off_ramp(model.head, certain).entropy_L.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entropies_are_wide(dtype: torch.dtype) -> None:
    model = deep_model().to(dtype)
    ramp = off_ramp(model.head, torch.randn(5, 16, dtype=dtype))
    assert ramp.entropy_L.dtype == ramp.log_p_L.dtype == torch.float32


@pytest.mark.parametrize("rows", ["fixed", "predicted"])
def test_other_sentences_and_their_order_do_not_matter(rows: str) -> None:
    model, sources = deep_model(seed=2), some_sources()
    options = HardExitDecoding.model_validate({"threshold": 2.0, "rows": rows, "max_length": 20})
    together = hard_exit(model, pack(sources), "mask", options)
    backwards = hard_exit(model, pack(sources[::-1]), "mask", options)
    parts = []
    for i, source in enumerate(sources):
        alone = hard_exit(model, pack([source]), "mask", options)
        assert alone.tokens[0].tolist() == together.tokens[i].tolist() == backwards.tokens[-1 - i].tolist()
        assert alone.scores[0] == pytest.approx(together.scores[i], abs=1e-10)
        parts.append(alone.exits)
    # what a text costs is its own, too: the batch is the sum of its texts
    assert together.exits == sum(parts[1:], parts[0]) == backwards.exits


def test_eos_ends_a_text_and_no_other_special_id_is_written() -> None:
    model = deep_model()
    model.head.bias_V = torch.zeros(VOCAB, dtype=torch.float64)
    model.head.bias_V[BANNED] = 50.0
    options = HardExitDecoding(max_length=16)
    found = hard_exit(model, pack(some_sources()), "mask", options)
    assert not any({*BANNED, IDS.eos} & set(tokens.tolist()) for tokens in found.tokens)
    model.head.bias_V = torch.zeros(VOCAB, dtype=torch.float64)
    model.head.bias_V[IDS.eos] = 50.0
    ended = hard_exit(model, pack(some_sources()), "mask", options)
    assert [len(tokens) for tokens in ended.tokens] == [0] * 5
    assert ended.exits is not None and sum(ended.exits.tokens) == 5 and ended.exits.mean == 1
    model.head.bias_V[IDS.eos] = -50.0
    endless = hard_exit(model, pack(some_sources()), "mask", options)
    assert [len(tokens) for tokens in endless.tokens] == [15] * 5


def test_it_takes_no_reference() -> None:
    assert list(inspect.signature(hard_exit).parameters) == ["model", "source", "first_row", "options"]


def about(**changes: object) -> Description:
    given = {"modes": ("hard_exit",), "objective": {"name": "lplm"}, **changes}
    return Description(deep_model().config, IDS, ArLayout.aligned("bos_first", IDS), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_bad_thresholds(threshold: float) -> None:
    for options in ({"threshold": threshold}, {"decoding": {"threshold": threshold}}):
        with pytest.raises(ConfigError, match=r"`(decoding\.)?threshold` must be .*, got") as error:
            runners.build({"name": "hard_exit", **options}, about())
        assert "\n" not in str(error.value)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="64 positions, got 65"):
        hard_exit(deep_model(), pack(some_sources()), "mask", HardExitDecoding(max_length=65))
    with pytest.raises(ConfigError, match="`test_layers` must be layers from 1 to 3, got 4"):
        runners.build({"name": "hard_exit", "decoding": {"test_layers": [1, 4]}}, about())
    with pytest.raises(ConfigError, match=r"`decoding\.rows` must be `fixed` where no length predictor"):
        runners.build({"name": "hard_exit", "decoding": {"rows": "predicted"}}, about())
    runners.build({"name": "hard_exit", "decoding": {"rows": "predicted"}}, about(length_trained=True))

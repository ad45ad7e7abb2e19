"""Self-drafting writes what greedy search writes, on random and on trained weights, and accepts what is right."""

import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.__main__ import main
from finetune.decoding import ArDecoding, DraftDecoding, Drafts, Generated, beam_search, draft
from pretrain.bundles.bundle import load_bundle
from pretrain.errors import ConfigError
from pretrain.models import EncoderDecoder, SourceRows, pack_streams
from pretrain.models.look_ahead import LookAhead
from pretrain.models.patterns import ArLayout, Layout, ar_two_stream
from pretrain.models.rows import Stream
from pretrain.objectives import Example, ObjectiveModule, build
from tests.finetune.models import IDS, SPECIAL, pack, some_sources, tiny_model
from tests.finetune.test_end_to_end import PAIRS, bundle_at, config_at

ALIGNED = ArLayout.aligned("bos_first", IDS)
LAYOUTS: list[tuple[Layout, int]] = [("bos_first", 1), ("bos_first", 0), ("eos_first", 0)]


def favour_eos(model: EncoderDecoder, by: float = 4.0) -> None:
    """Random models rarely end; these do, after different numbers of tokens."""
    model.head.bias_V = torch.zeros(40, dtype=torch.float64)
    model.head.bias_V[IDS.eos] = by


def greedy(model: EncoderDecoder, source: SourceRows, layout: ArLayout, max_length: int) -> Generated:
    return beam_search(model, source, layout, "query", ArDecoding(beam=1, max_length=max_length))


def assert_same(found: Generated, expected: Generated) -> None:
    assert [tokens.tolist() for tokens in found.tokens] == [tokens.tolist() for tokens in expected.tokens]
    assert found.scores == pytest.approx(expected.scores, abs=1e-5)


@pytest.mark.parametrize(("start", "offset"), LAYOUTS)
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("block", [1, 3])
def test_every_row_of_a_pass_reads_what_its_pattern_grants(start: Layout, offset: int, norm: str, block: int) -> None:
    """Two passes of which the first is kept in part, against one full forward for each window."""
    model, layout = tiny_model(norm=norm, decoder_layers=3), ArLayout(start, offset, IDS)
    sources, rng = some_sources((4, 7, 3)), np.random.default_rng(0)
    with torch.no_grad():
        state = LookAhead(model, pack(sources), layout, longest=12, fed=4, ahead=block)
        fed = [rng.integers(5, 40, size=4) for _ in sources]
        state.step(np.arange(3), torch.from_numpy(np.stack(fed)))
        kept = np.array([3, 1, 4])
        state.keep(np.arange(3), kept)
        texts = np.array([0, 2])  # one has ended
        more = rng.integers(5, 40, size=(2, 3))
        found = state.step(texts, torch.from_numpy(more))
        assert found.shape == (2, 3, block + 1, 16)
        for row, text in enumerate(texts):
            content = np.concatenate([fed[text][: kept[text]], more[row]])
            memory = model.encode(pack([sources[text]]))
            whole = (0, len(memory))
            target = np.append(content, 9) if layout.shift else np.append(content[1:], 9)
            streams = ar_two_stream(target, whole, layout, 0)
            streams[0].tokens = content  # what was fed, whatever the layout begins with
            packed, _, _ = pack_streams(streams, len(memory))
            expected = model.decode(packed, memory)[-3:]
            torch.testing.assert_close(found[row, :, 0], expected, rtol=0, atol=1e-10)
            for i in range(3):
                seen = kept[text] + i + 1
                tokens = np.append(content[:seen], [IDS.mask] * (block + 1))
                ahead = seen - 1 + layout.shift + np.arange(block + 1)
                ahead[0] = seen - 1 + offset  # the query is the first MASK, and reads no other
                segments = [(seen, 1, 1, 0, 0, 0), (1, seen, 0, 0, 0, 0), (block, seen + block + 1, 0, 0, 0, 0)]
                positions, used = np.append(np.arange(seen), ahead), (seen + 1, seen + 1 + block)
                stream = Stream(tokens, positions, segments, whole, used, tokens[:block], 0)
                packed, _, _ = pack_streams([stream], len(memory))
                torch.testing.assert_close(found[row, i, 1:], model.decode(packed, memory), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("start", "offset"), LAYOUTS)
@pytest.mark.parametrize("block", [1, 2, 5])
def test_random_weights_write_the_greedy_text(start: Layout, offset: int, block: int) -> None:
    model, layout, sources = tiny_model(), ArLayout(start, offset, IDS), some_sources()
    favour_eos(model)
    expected = greedy(model, pack(sources), layout, 14)
    found = draft(model, pack(sources), layout, DraftDecoding(block=block, max_length=14))
    assert_same(found, expected)
    assert len({len(tokens) for tokens in found.tokens}) > 1
    assert found.passes <= expected.passes
    assert found.drafts is not None
    assert found.drafts.tokens == sum(len(tokens) + 1 for tokens in found.tokens)
    assert sum(found.drafts.accepted) == found.drafts.passes - len(sources)  # the first pass verifies nothing


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    block=st.integers(1, 6),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    by=st.floats(0.0, 8.0),
    max_length=st.integers(3, 16),
)
def test_any_batch_writes_the_greedy_text(
    seed: int, block: int, lengths: list[int], by: float, max_length: int
) -> None:
    model, sources = tiny_model(seed=seed), pack(some_sources(tuple(lengths), seed=seed))
    favour_eos(model, by)
    found = draft(model, sources, ALIGNED, DraftDecoding(block=block, max_length=max_length))
    assert_same(found, greedy(model, sources, ALIGNED, max_length))
    assert not any(set(SPECIAL) & set(tokens.tolist()) for tokens in found.tokens)


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_where_nothing_depends_on_the_text_every_draft_is_right(block: int) -> None:
    """Without self-attention both patterns compute the same row, so that the passes can be counted beforehand."""
    model, sources = tiny_model(), some_sources()
    for layer in model.decoder.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    model.head.bias_V = torch.zeros(40, dtype=torch.float64)
    model.head.bias_V[IDS.eos] = -50.0
    found = draft(model, pack(sources), ALIGNED, DraftDecoding(block=block, max_length=32))
    assert_same(found, greedy(model, pack(sources), ALIGNED, 32))
    # 30 tokens and an EOS, which is drafted where no place is left; the first pass writes one, the others block + 1.
    whole, rest = divmod(30, block + 1)
    accepted = [0] * (block + 1)
    accepted[block] = 5 * whole
    if rest:
        accepted[rest] += 5
    assert found.passes == 1 + whole + bool(rest)
    assert found.drafts == Drafts(tuple(accepted), 5 * 31, 5 * found.passes)


@cache
def trained() -> tuple[EncoderDecoder, list[np.ndarray]]:
    """A JANUS that has learned, not quite, to say every token of its source twice; and other sources."""
    model = tiny_model(vocab=12, d_model=32, ffn_dim=64, heads=4, norm="pre", dropout=0.0, init_std=0.1).float()
    objective = build({"name": "janus", "pair_masking": "uniform"}, IDS, None, model.config)
    module = ObjectiveModule(model.train(), objective)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    rng = np.random.default_rng(0)

    def source() -> np.ndarray:
        return np.array([IDS.bos, *rng.integers(5, 12, size=rng.integers(3, 9)), IDS.eos])

    def example() -> Example:
        given = source()
        return objective.corrupt_pair(given, np.array([IDS.bos, *np.repeat(given[1:-1], 2), IDS.eos]), rng)

    for _ in range(55):
        batch = objective.collate([example() for _ in range(16)])
        counts = objective.counts(batch)
        scale = {name: weight / max(1, counts[name]) for name, weight in objective.weights.items()}
        total, _ = module(batch, scale)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return model.eval(), [source() for _ in range(24)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 4])
def test_trained_weights_write_the_greedy_text_in_fewer_passes(dtype: torch.dtype, block: int) -> None:
    model, sources = trained()
    model.to(dtype)
    options = DraftDecoding(block=block, max_length=24, compare=True)
    found = draft(model, pack(sources), ALIGNED, options)
    assert_same(found, greedy(model, pack(sources), ALIGNED, 24))
    assert len({len(tokens) for tokens in found.tokens}) > 3
    drafts = found.drafts
    assert drafts is not None and drafts.compared is not None and drafts.compared[2] == 0
    assert drafts.mean > 0.4 and drafts.tokens > 1.3 * drafts.passes
    assert np.count_nonzero(drafts.accepted) > block / 2 and drafts.accepted[-1]  # blocks are right, some in part
    alone = draft(model, pack(sources[:1]), ALIGNED, options)
    assert alone.tokens[0].tolist() == found.tokens[0].tolist()


def test_a_comparison_counts_texts_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = tiny_model(), pack(some_sources())
    options = DraftDecoding(max_length=8, compare=True)
    made = greedy(model, source, ALIGNED, 8)
    other = Generated([made.tokens[0][:-1], *made.tokens[1:]], made.scores, made.passes)
    monkeypatch.setattr(sys.modules[draft.__module__], "beam_search", lambda *_: other)
    drafts = draft(model, source, ALIGNED, options).drafts
    assert drafts is not None and drafts.compared is not None and drafts.compared[2] == 1
    assert "1 texts differ" in drafts.report()


def test_figures_add_up() -> None:
    one, two = Drafts((3, 1, 0), 8, 5, (1.0, 2.0, 0)), Drafts((0, 2, 4), 10, 5, (2.0, 4.0, 1))
    both = one + two
    assert both == Drafts((3, 3, 4), 18, 10, (3.0, 6.0, 1))
    assert both.mean == pytest.approx(1.1)
    assert both.report() == (
        "1.80 tokens a pass where greedy search writes 1, accepted 1.10 of 2 drafted (0: 30 % 1: 30 % 2: 40 %), "
        "2.00 times as fast as greedy search (3.00 s, 6.00 s), 1 texts differ"
    )


def test_it_takes_no_reference_and_leaves_the_model_as_it_was() -> None:
    assert list(inspect.signature(draft).parameters) == ["model", "source", "layout", "options"]
    model = tiny_model(dropout=0.5).train()
    first, again = (draft(model, pack(some_sources()), ALIGNED, DraftDecoding(max_length=9)) for _ in range(2))
    assert model.training
    assert_same(first, again)


def test_edges() -> None:
    model, sources = tiny_model(), pack(some_sources())
    empty = draft(model, pack([]), ALIGNED, DraftDecoding(compare=True))
    assert empty.tokens == [] and empty.drafts is None
    for max_length in (3, 64):  # the shortest texts, and the model's last position
        found = draft(model, sources, ALIGNED, DraftDecoding(block=9, max_length=max_length))
        assert_same(found, greedy(model, sources, ALIGNED, max_length))
        assert max(len(tokens) for tokens in found.tokens) == max_length - 2
    with pytest.raises(ConfigError, match="64 positions, got 65"):
        draft(model, sources, ALIGNED, DraftDecoding(max_length=65))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    bundle_at(folder / "janus", ("ar", "nar"), "bos_first")
    bundle_at(folder / "one", ("ar",), "bos_first")
    bundle_at(folder / "other", ("nar",), "bos_first")
    lines = [f"{source}\t{target}\n" for source, target in PAIRS]
    (folder / "train.tsv").write_text("".join(lines[20:]), encoding="utf-8")
    (folder / "valid.tsv").write_text("".join(lines[:10]), encoding="utf-8")
    (folder / "test.src").write_text("".join(f"{source}\n" for source, _ in PAIRS[10:20]), encoding="utf-8")
    (folder / "test.tgt").write_text("".join(f"{target}\n" for _, target in PAIRS[10:20]), encoding="utf-8")
    return folder


def command(place: Path, bundle: Path, mode: str, *options: Any) -> list[str]:
    return ["generate", str(bundle), "--mode", mode, "--input", str(place / "test.src"), "--output", "-", *options]


def test_tune_and_generate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shorter = {"ar": {"max_length": 16}, "nar": {"max_length": 16}}
    uniform = {"name": "janus", "pair_masking": "uniform", "decoding": shorter}
    assert main(["train", str(config_at(place, "tuned", "janus", runner=uniform))]) == 0
    bundle = place / "runs" / "tuned" / "bundle"
    assert load_bundle(bundle).description.modes == ("ar", "nar")
    for folder in (bundle, place / "janus"):
        capsys.readouterr()
        assert main(command(place, folder, "ar", "--beam", "1", "--max-length", "16")) == 0
        expected = capsys.readouterr().out
        assert main(command(place, folder, "draft", "--block", "3", "--compare", "--max-length", "16")) == 0
        made = capsys.readouterr()
        assert made.out == expected and made.out.count("\n") == 10
        assert "tokens a pass" in made.err and "of 3 drafted" in made.err and "0 texts differ" in made.err


@pytest.mark.parametrize(
    ("bundle", "mode", "options", "code", "message"),
    [
        ("one", "draft", (), 2, "`--mode` draft needs a bundle with modes ar and nar, `BUNDLE` has ar:"),
        ("other", "draft", (), 2, "`--mode` draft needs a bundle with modes ar and nar, `BUNDLE` has nar:"),
        ("janus", "ar", ("--block", "2"), 2, "`--block` must not be given with `--mode` ar"),
        ("janus", "draft", ("--beam", "2"), 2, "`--beam` must not be given with `--mode` draft"),
        ("janus", "draft", ("--block", "0"), 3, "`decoding.block` must be greater than or equal to 1, got 0"),
    ],
)
def test_refusals_are_one_line(
    place: Path, bundle: str, mode: str, options: tuple[str, ...], code: int, message: str, capsys: Any
) -> None:
    assert main(command(place, place / bundle, mode, *options)) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message.replace("BUNDLE", str(place / bundle)) in error

"""The model card: what the bundle's files say and nothing else, safe to edit, and true about transformers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from finetune.decoding import ArDecoding, beam_search
from pretrain.bundles.bundle import load_bundle, write_bundle
from pretrain.bundles.card import CARD, END_TESTED, TESTED, loads_in_transformers, model_card
from pretrain.bundles.description import Description
from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError
from pretrain.models import EncoderDecoder, SourceRows
from pretrain.models.golden import golden
from pretrain.models.patterns import ArLayout
from tests.pretrain.bundles.test_bart import packed_logits, padded_logits
from tests.pretrain.bundles.test_bundle import IDS, TOKENIZER

PRETRAINED = {
    "run": "janus_base",
    "step": 54200,
    "samples": 1234567,
    "tokens": 987654321,
    "config": {
        "seed": 7000, "objective": {"name": "janus", "preset": "paper"}, "init_from": "bundles/bart",
        "optim": {"lr": 1e-4}, "batch": {"samples": None, "tokens": 65536, "micro_max_tokens": 4096},
        "engine": {"precision": "bf16"},
    },
    "environment": {"device": "NVIDIA H200", "ranks": 8, "packages": {"torch": "2.9.1"}},
    "data": {"sources": [
        {"name": "wiki", "licence": "CC BY-SA 3.0", "samples": 400000, "tokens": 41000000},
        {"name": "books|<img src=x>\n# owned", "licence": None, "samples": 2, "tokens": 3},
    ]},
}  # fmt: skip
TUNED = {
    "run": "xsum-nar",
    "step": 300,
    "config": {"task": {"name": "xsum"}, "runner": {"name": "nar"}, "optim": {"lr": 3e-4}, "batch": {"samples": 64}},
    "pairs": {"train": 204045, "valid": 11332, "test": 11334},
    "checkpoints": [300],
    "scores": [
        {
            "valid/total": 2.5,
            "written/nar/rougeL": 33.4037,
            "written/nar/bleu": 12,
            "written/pairs": 64.0,
            "written/nar/bad": float("nan"),
            "written/nar/note": "not a number",
        }
    ],
    "tuned_from": PRETRAINED,
}
SHAPE = {"vocab_size": TOKENIZER.vocab_size, "d_model": 8, "encoder_layers": 1, "decoder_layers": 2, "heads": 2,
         "ffn_dim": 16, "max_positions": 32}  # fmt: skip


def describe(modes, trained=True, objective="denoise", layout="eos_first", **shape) -> Description:
    config = ModelConfig(**{**SHAPE, **shape})
    return Description(config, IDS, ArLayout.aligned(layout, IDS), modes, {"name": objective}, 24, trained)


def model_of(description: Description) -> EncoderDecoder:
    torch.manual_seed(3)
    return EncoderDecoder(description.model.model_copy(update={"init_std": 0.3}), IDS).eval()


def card(description: Description, provenance: dict) -> str:
    return model_card(model_of(description), description, provenance)


def sections(text: str) -> dict[str, str]:
    return {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in text.split("\n## ")[1:]}


def rows(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines() if line[:1] == "|"
    ]


def test_a_tuned_bundle_tells_its_whole_past() -> None:
    text = card(describe(("nar",)), TUNED)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"library_name": "parlance", "tags": ["encoder-decoder", "nar"]}
    assert "\n# xsum-nar\n" in text and "up to 24 tokens" in text and "width 8, 1 + 2 layers, 2 heads" in text
    told = sections(text)
    training = {row[0]: row[1:] for row in rows(told["Training"])}
    assert training[""] == ["pre-training", "tuning"]
    assert training["updates"] == ["54,200", "300"] and training["target tokens"] == ["987,654,321", ""]
    assert (
        training["seed"] == ["7000", ""]
        and training["objective"] == ["janus", "nar"]
        and training["preset"] == ["paper", ""]
    )
    assert training["batch"] == ["65,536 tokens", "64 samples"] and training["peak learning rate"] == [
        "0.0001",
        "0.0003",
    ]
    assert training["device"] == ["NVIDIA H200", ""] and training["from"] == ["bundles/bart", ""]
    data = rows(told["Data"])
    assert data[2] == ["wiki", "CC BY-SA 3.0", "400,000", "41,000,000"]
    assert "task `xsum`: pairs 204,045 train, 11,332 valid, 11,334 test." in told["Data"]
    assert rows(told["Scores"]) == [
        ["mode", "metric", "update 300"], ["---"] * 3,
        ["", "validation loss", "2.5"], ["nar", "rougeL", "33.4037"], ["nar", "bleu", "12"],
    ]  # fmt: skip
    assert "whole texts of the first 64 validation pairs," in told["Scores"]
    assert "Chosen by" not in told["Scores"] and "mean" not in told["Scores"]
    assert (
        told["Scores"].index(TESTED) < told["Scores"].index("None of the test set") < told["Scores"].index(END_TESTED)
    )


def test_scores_of_several_checkpoints() -> None:
    scores = [{"written/hard_exit/bleu": 3.0, "written/pairs": 8}, {"valid/total": 1.0, "written/hard_exit/bleu": 2.0}]
    several = {"checkpoints": [4, 2], "scores": scores, "selected_by": "written/hard_exit/bleu", "pairs": {"valid": 0}}
    told = sections(card(describe(("nar",)), {**TUNED, **several}))["Scores"]
    assert rows(told)[0] == ["mode", "metric", "update 4", "update 2"]
    assert rows(told)[2:] == [["hard\\_exit", "bleu", "3", "2"], ["", "validation loss", "", "1"]]
    assert "the first 8 training pairs" in told and "the mean itself was not measured" in told
    assert "Chosen by written/hard\\_exit/bleu." in told


@pytest.mark.parametrize("scores", [[3.5], [{}], [{"valid/total": 1.0}] * 2, {"valid/total": 1.0}, None])
def test_scores_that_say_nothing_are_left_out(scores: object) -> None:
    """Among them those of an older bundle: numbers without names."""
    told = sections(card(describe(("nar",)), {**TUNED, "scores": scores}))["Scores"]
    assert told.startswith(TESTED) and not rows(told)


def test_only_the_loss_was_measured() -> None:
    told = sections(card(describe(("nar",)), {**TUNED, "scores": [{"valid/total": 2.0}]}))["Scores"]
    assert told.startswith("Measured in training.\n\n| mode |") and "whole texts" not in told


def test_a_name_stays_in_its_cell() -> None:
    found = rows(sections(card(describe(("nar",)), PRETRAINED))["Data"])[3]
    assert found == ["books\\|\\<img src=x\\> \\# owned", "not recorded", "2", "3"]
    assert "\n# owned" not in card(describe(("nar",)), PRETRAINED)


@pytest.mark.parametrize("provenance", [{}, {"step": 5}, {"config": 3, "data": {"sources": 4}, "tuned_from": "x"}])
def test_what_nobody_knows_is_said_to_be_unknown(provenance: dict) -> None:
    told = sections(card(describe(("causal",)), provenance))
    assert "not recorded" in told["Data"] and "None are recorded" in told["Scores"]
    assert list(told) == ["Training", "Data", "Scores", "Licence", "Use"]


def test_only_what_works_is_offered() -> None:
    ready = sections(card(describe(("ar", "nar")), {}))["Use"]
    assert "--mode ar" in ready and "--mode nar" in ready and 'mode="ar"' in ready and "export-bart" in ready
    untrained = card(describe(("ar", "nar"), trained=False), {})
    assert (
        "--mode nar --" not in untrained and "the length predictor is untrained: tune before `--mode nar`." in untrained
    )
    nothing = card(describe(()), {})
    assert "must be tuned" in nothing and "finetune train" in nothing and "import load" not in nothing


def test_it_may_be_edited_and_nothing_else(tmp_path: Path) -> None:
    description = describe(("causal",))
    bundle = write_bundle(tmp_path / "b", model_of(description).state_dict(), description, TOKENIZER, {"run": "r"})
    assert (bundle / CARD).read_text(encoding="utf-8").startswith("---\nlibrary_name")
    (bundle / CARD).write_text("Mine.\n", encoding="utf-8")
    load_bundle(bundle)
    (bundle / CARD).unlink()
    load_bundle(bundle)
    (bundle / "NOTES.md").write_text("Mine.\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"NOTES\.md is not in the manifest"):
        load_bundle(bundle)


# ------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("layout", ["eos_first", "bos_first"])
def test_a_plain_bart_bundle_loads_in_transformers_as_the_card_says(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    description = describe(("causal",), layout=layout)
    made = model_of(description)
    bundle = write_bundle(tmp_path / "b", made.state_dict(), description, TOKENIZER, {"run": "r"})
    code = sections((bundle / CARD).read_text(encoding="utf-8"))["Use"].split("```python\n")[2].split("```")[0]
    found: dict = {}
    exec(code.replace("BUNDLE", str(bundle)), found)
    model, tokenizer = found["model"], found["tokenizer"]

    text = "a tiny text of a few words"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0, 1:-1].tolist() == TOKENIZER.encode(text).tolist()
    # double, so that equal scores decide nothing
    source = SourceRows.pack([ids[0].numpy()])
    greedy = ArDecoding(beam=1, max_length=12, no_repeat_ngram=2)
    ours = beam_search(made.double(), source, description.layout, "content", greedy).tokens[0].tolist()
    never = [[token] for token in (IDS.bos, IDS.pad, IDS.mask, IDS.unk)]
    longest = 13 if layout == "eos_first" else 12
    options = {"num_beams": 1, "max_length": longest, "bad_words_ids": never, "no_repeat_ngram_size": 2}
    theirs = model.double().generate(ids, **options)[0].tolist()
    theirs = [token for token in theirs if token not in (IDS.bos, IDS.eos, IDS.pad)]
    assert ours == theirs[:10] and len(set(ours)) > 1


@pytest.mark.parametrize(
    ("modes", "shape", "whether"),
    [
        (("causal",), {}, True),
        (("ar", "nar"), {}, False),
        (("causal",), {"logits_bias": True}, False),
        (("causal",), {"norm": "pre"}, False),
        (("causal",), {"positions": "sinusoidal"}, False),
        (("causal",), {"embed_norm": False}, False),
    ],
)
def test_the_card_promises_transformers_only_where_logits_are_equal(modes, shape, whether, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    description = describe(modes, objective="janus" if "ar" in modes else "denoise", **shape)
    made = model_of(description)
    if shape.get("logits_bias"):
        made.head.bias_V.normal_()
    bundle = write_bundle(tmp_path / "b", made.state_dict(), description, TOKENIZER, {"run": "r"})
    target = np.array([IDS.bos, 7, 8, 9, 10, IDS.eos])
    model = transformers.BartForConditionalGeneration.from_pretrained(bundle).eval()
    with torch.no_grad():
        if "ar" in modes:  # what such a bundle writes with is its query stream
            ours = golden(made, description.layout, ("ar",))
            content = description.layout.content(ours["in/target"].numpy())
            right, found = padded_logits(model, [ours["in/source"].numpy()], [content]), ours["logits/ar"]
        else:
            right = padded_logits(model, [target], [description.layout.content(target)])
            found = packed_logits(made, description.layout, [target], [target])
    assert torch.allclose(found, right, rtol=1e-4, atol=1e-4) == whether == loads_in_transformers(description)

"""The model card of a bundle, its README.md: what it is, what it was made of, how to use it.

It says what the bundle's own files say, and of what they do not say that it is not recorded. People may edit it: it is
the one file of a bundle that no seal covers.
"""

import math
from collections.abc import Mapping
from typing import Any

from pretrain import objectives
from pretrain.bundles.description import Description
from pretrain.config import complete
from pretrain.models import EncoderDecoder

CARD = "README.md"
HOW = {
    "ar": "left to right, on the query stream (JANUS)",
    "causal": "left to right, on the content stream (BART)",
    "nar": "all tokens at once, then refined: mask-predict",
    "hard_exit": "all tokens at once, each from the first decoder layer that is sure of it (ELMER)",
    "soft_exit": "all tokens at once, every layer fed what the one below would write (ELMER)",
}
COMMAND = {
    "ar": "--mode ar --beam 4",
    "causal": "--mode ar --beam 4",
    "nar": "--mode nar --iterations 4",
    "hard_exit": "--mode hard_exit",
    "soft_exit": "--mode soft_exit",
}
UNKNOWN = "not recorded"
# Between these lines `python -m finetune report --cards` writes; what stands outside of them is left alone.
TESTED, END_TESTED = "<!-- test scores, by finetune report --cards -->", "<!-- end of test scores -->"


def model_card(model: EncoderDecoder, description: Description, provenance: Mapping[str, Any]) -> str:
    """The text of README.md.

    provenance: as `handoff`, `import-bart` and `finetune train` write it. Of a tuned bundle `checkpoints` are the
    updates it is made of, and `scores` has {name in TensorBoard: value} of each, measured at its update.
    """
    name = _plain(provenance.get("run") or provenance.get("imported_from") or "A bundle")
    size, config = sum(value.numel() for value in model.parameters()), description.model
    tags = "".join(f"- {tag}\n" for tag in ("encoder-decoder", *(mode.replace("_", "-") for mode in description.modes)))
    modes = [(f"`{mode}`", HOW[mode]) for mode in description.modes]
    but = advice(description)
    parts = [
        f"---\nlibrary_name: parlance\ntags:\n{tags}---",
        f"# {name}",
        f"An encoder-decoder of {size:,} parameters: width {config.d_model}, {config.encoder_layers} + "
        f"{config.decoder_layers} layers, {config.heads} heads, {config.vocab_size:,} tokens, {config.max_positions:,} "
        f"positions. Sources of up to {description.longest_source:,} tokens; longer ones are cut.",
        _table(("mode", "how it writes"), modes) if modes else "It must be tuned before it writes.",
        *([f"Not yet of use: {but[2:-1]}."] if but else []),
        "## Training",
        *_training(provenance),
        "## Data",
        *_data(provenance),
        "## Scores",
        *_scores(provenance),
        "## Licence",
        "This card states none for the weights: whoever publishes them does. The table above has the licences of the "
        "data as far as they were recorded.",
        "## Use",
        *_use(description),
    ]
    return "\n\n".join(parts) + "\n"


def advice(description: Description) -> str:
    """Why to tune before the bundle writes, in brackets; empty where it may write as it is."""
    modes, objective = description.modes, description.objective
    if objective.get("name") in objectives.REGISTRY:
        objective = complete(objectives.REGISTRY, objective, "objective")
    told = objective.get("rows") == "target"
    if "nar" in modes and not description.length_trained:
        return " (the length predictor is untrained: tune before `--mode nar`)"
    if told and ("soft_exit" in modes or ("hard_exit" in modes and not description.length_trained)):
        return f" (the number of decoder rows told the length: tune before `--mode {modes[0]}`)"
    return ""


def loads_in_transformers(description: Description) -> bool:
    """Whether `BartForConditionalGeneration.from_pretrained` reads the folder itself and computes what is written.

    A bias of the logits has another name there; `export-bart` translates it.
    """
    model = description.model
    bart = model.norm == "post" and model.positions == "learned" and model.embed_norm and not model.logits_bias
    return bart and "causal" in description.modes


# ------------------------------------------------------------------------------------------------------------ sections


def _training(provenance: Mapping[str, Any]) -> list[str]:
    """A column for each stage, the first one on the left."""
    stages = _stages(provenance)
    names = [
        "import" if "imported_from" in stage else "tuning" if "tuned_from" in stage else "pre-training"
        for stage in stages
    ]
    told = [_stage(stage) for stage in stages]
    rows = [[key, *(one.get(key, "") for one in told)] for key in dict.fromkeys(key for one in told for key in one)]
    return [_table(("", *names), rows)] if rows else [f"How these weights came about is {UNKNOWN}."]


def _stages(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    before = provenance.get("tuned_from")
    return [*(_stages(before) if isinstance(before, Mapping) else []), provenance]


def _stage(stage: Mapping[str, Any]) -> dict[str, str]:
    """What one stage says of itself."""
    if "imported_from" in stage:
        return {"from": _plain(stage["imported_from"])}
    config, environment = _mapping(stage.get("config")), _mapping(stage.get("environment"))
    objective = _mapping(config.get("objective") or config.get("runner"))
    optim, packages = _mapping(config.get("optim")), _mapping(environment.get("packages"))
    sizes = {key: _mapping(config.get("batch")).get(key) for key in ("samples", "tokens")}
    batch = [f"{_plain(value)} {key}" for key, value in sizes.items() if value]
    told = {
        "run": stage.get("run"),
        "objective": objective.get("name"),
        "preset": objective.get("preset"),
        "from": config.get("init_from"),
        "updates": stage.get("step"),
        "samples": stage.get("samples"),
        "target tokens": stage.get("tokens"),
        "batch": ", ".join(batch),
        "peak learning rate": optim.get("lr"),
        "seed": str(config.get("seed", "")),
        "precision": _mapping(config.get("engine")).get("precision"),
        "device": environment.get("device"),
        "ranks": environment.get("ranks"),
        "torch": packages.get("torch"),
    }
    return {key: _plain(value) for key, value in told.items() if value not in (None, "")}


def _data(provenance: Mapping[str, Any]) -> list[str]:
    parts = []
    for stage in _stages(provenance):
        sources = _mapping(stage.get("data")).get("sources")
        if isinstance(sources, list):
            keys = ("name", "licence", "samples", "tokens")
            rows = [[_plain(_mapping(source).get(key) or UNKNOWN) for key in keys] for source in sources]
            parts.append(_table(("pre-training on", *keys[1:]), rows))
        if "pairs" in stage:
            task = _mapping(_mapping(stage.get("config")).get("task")).get("name", UNKNOWN)
            pairs = ", ".join(f"{_plain(count)} {_plain(split)}" for split, count in _mapping(stage["pairs"]).items())
            what = "Tuned" if "tuned_from" in stage else "Random weights, with a tokenizer,"
            parts.append(f"{what} for the task `{_plain(task)}`: pairs {pairs}.")
    return parts or [f"What the weights were trained on is {UNKNOWN}."]


def _scores(provenance: Mapping[str, Any]) -> list[str]:
    if not isinstance(provenance.get("tuned_from"), Mapping):
        return ["None are recorded. `python -m finetune score` measures them."]
    none = "None of the test set are recorded. `python -m finetune report RUN --cards` writes them here."
    return [*_validation(provenance), "\n".join([TESTED, none, END_TESTED])]


def _validation(provenance: Mapping[str, Any]) -> list[str]:
    """A row for each mode and metric, a column for each checkpoint; nothing where nothing was measured."""
    steps, scores = (one if isinstance(one := provenance.get(key), list) else [] for key in ("checkpoints", "scores"))
    measured = [_finite(one) for one in scores]
    rows = []
    for tag in dict.fromkeys(tag for one in measured for tag in one):
        group, _, name = tag.partition("/")
        mode, _, metric = name.partition("/")
        shown = [_plain(one.get(tag, "")) for one in measured]
        if tag == "valid/total":
            rows.append(["", "validation loss", *shown])
        elif group == "written" and metric:
            rows.append([_plain(mode), _plain(metric), *shown])
    if not rows or len(steps) != len(measured):
        return []
    told = ["Measured in training."]
    if any(mode for mode, *_ in rows):
        split = "validation" if _mapping(provenance.get("pairs")).get("valid") else "training"
        counts = {int(one["written/pairs"]) for one in measured if "written/pairs" in one}
        first = f"the first {_plain(*counts)} {split} pairs" if len(counts) == 1 else f"the first {split} pairs"
        told.append(f"Modes: whole texts of {first}, written as `runner.decoding` of the run says.")
    if "selected_by" in provenance:
        told.append(f"Chosen by {_plain(provenance['selected_by'])}.")
    if len(steps) > 1:
        told.append("The weights are the mean of these checkpoints; the mean itself was not measured.")
    return [" ".join(told), _table(("mode", "metric", *(f"update {_plain(step)}" for step in steps)), rows)]


def _use(description: Description) -> list[str]:
    ready = [mode for mode in description.modes if f"--mode {mode}`" not in advice(description)]
    ways = dict.fromkeys(COMMAND[mode] for mode in ready)
    commands = [f"python -m finetune generate BUNDLE {way} --input FILE --output FILE" for way in ways]
    parts = ["From a checkout of Parlance, which checks every bit and computes golden logits again before it writes:"]
    parts.append(_code("sh", *(commands or ["python -m finetune train CONFIG bundle=BUNDLE"])))
    if ready:
        call = f'texts = load("BUNDLE").generate(["A source.", "Another one."], mode="{COMMAND[ready[0]].split()[1]}")'
        parts.append(_code("python", "from finetune import load", "", call))
    if loads_in_transformers(description):
        parts += [
            "With `transformers` alone, which computes the same logits; `length_head.weight` is ours, and left out:",
            _code(
                "python",
                "from transformers import AutoTokenizer, BartForConditionalGeneration",
                "",
                'model = BartForConditionalGeneration.from_pretrained("BUNDLE")',
                'tokenizer = AutoTokenizer.from_pretrained("BUNDLE")',
            ),
        ]
    else:
        parts.append(
            "`transformers` would load this folder and compute something else. `python -m pretrain export-bart BUNDLE "
            "--out FOLDER` writes what BART can express of it, its content stream, or refuses."
        )
    return parts


# -------------------------------------------------------------------------------------------------------------- pieces


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _finite(values: Any) -> dict[str, float]:
    numbers = {key: value for key, value in _mapping(values).items() if type(value) in (int, float)}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _plain(value: Any) -> str:
    """One line of a cell, whatever somebody has called a source or a run."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())[:200]
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>|#" else letter for letter in text)

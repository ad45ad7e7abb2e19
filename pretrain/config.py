"""Configuration: one YAML, an optional single `base:`, dotted `key=value` overrides, read once.

`load` returns a frozen `RunConfig`. An unknown key is an error that names the nearest valid one, types and
ranges are checked on load, and components receive plain values from here, never this object.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pretrain.errors import ConfigError
from pretrain.parsing import parse_scalar, read_yaml

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
NAME_HINT = "up to 100 letters, digits and ._-, the first a letter or digit"
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of every configuration section: immutable, closed, no coercion of strings into numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _complete_sections(cls, values: Any) -> Any:
        """A section given in part keeps this owner's defaults for the rest."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(field.default, Section) and isinstance(values.get(name), dict):
                # Only what the owner sets, so that `model_fields_set` still tells what was given.
                values[name] = {**field.default.model_dump(exclude_unset=True), **values[name]}
        return values


class ModelConfig(Section):
    """Shape of the encoder-decoder. `vocab_size: null` takes the size of the data's tokenizer.

    off_ramps: one vocabulary head for all decoder layers, or one each. soft_exit: a projection of [state; token].
    """

    vocab_size: int | None = Field(None, ge=8)
    d_model: int = Field(256, ge=8)
    encoder_layers: int = Field(3, ge=1)
    decoder_layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    ffn_dim: int = Field(1024, ge=8)
    activation: Literal["gelu", "relu"] = "gelu"
    norm: Literal["post", "pre"] = "post"
    positions: Literal["learned", "sinusoidal"] = "learned"
    max_positions: int = Field(1024, ge=8)
    embed_scale: bool = False
    embed_norm: bool = True
    logits_bias: bool = False
    dropout: Rate = 0.1
    attention_dropout: Rate = 0.1
    activation_dropout: Rate = 0.0
    length_classes: int = Field(256, ge=4)
    off_ramps: Literal["shared", "separate"] = "shared"
    soft_exit: bool = False
    init_std: Positive = 0.02

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.d_model % self.heads:
            raise ValueError(f"`d_model` must be a multiple of `heads` ({self.heads}), got {self.d_model}")
        return self


class DataConfig(Section):
    """A folder written by `prepare`; `weights` blends its sources (absent: in proportion to their size)."""

    path: str
    weights: dict[str, Annotated[float, Field(ge=0.0)]] | None = None
    workers: int = Field(1, ge=0, le=64)
    on_bad_shard: Literal["stop", "skip"] = "stop"


class BatchConfig(Section):
    """Global batch of one update, in samples or in target tokens; micro-batches are derived."""

    samples: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    micro_max_tokens: int = Field(4096, ge=16)

    @model_validator(mode="after")
    def _one_unit(self) -> "BatchConfig":
        if (self.samples is None) == (self.tokens is None):
            raise ValueError("give exactly one of `samples` and `tokens`")
        return self


class OptimConfig(Section):
    """Adam with decoupled weight decay, warm-up and a schedule over `train.steps`.

    kind: torch's implementation, or NVIDIA's apex's, on a GPU where that is installed. Both have the same state.
    """

    kind: Literal["adamw", "apex_fused_adam"] = "adamw"
    lr: Positive = 5e-4
    betas: tuple[Rate, Rate] = (0.9, 0.98)
    eps: Positive = 1e-8
    weight_decay: float = Field(0.01, ge=0.0)
    clip: float = Field(1.0, ge=0.0, description="global gradient norm, 0 = no clipping")
    schedule: Literal["inverse_sqrt", "polynomial", "cosine", "constant"] = "inverse_sqrt"
    warmup: int = Field(0, ge=0)
    end_lr: float = Field(0.0, ge=0.0)
    power: Positive = 1.0

    @model_validator(mode="before")
    @classmethod
    def _list_is_a_pair(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            values = {**values, "betas": tuple(values["betas"])}
        return values


class EngineConfig(Section):
    """How the update is computed: by DeepSpeed (ZeRO 0-3) or by plain torch (`local`)."""

    kind: Literal["deepspeed", "local"] = "deepspeed"
    zero_stage: int = Field(2, ge=0, le=3)
    tensor_parallel: int = Field(1, ge=1, le=1024, description="neighbouring ranks that share one model")
    offload: Literal["none", "optimizer", "all"] = "none"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    backend: Literal["auto", "torch", "library", "cuda"] = "auto"
    layer_norm: Literal["torch", "apex"] = Field(
        "torch", description="apex: on a GPU, keeps the output for the backward, which the next layer keeps as well"
    )
    check_calls: bool = Field(False, description="slow: name the first module that some ranks call and others do not")


class TrainConfig(Section):
    """Length of the run and the rhythm of everything periodic, in updates (0 = never).

    epochs: passes over the training data, in place of `steps`, which is 0 until the data tells how many those are.
    async_save: write checkpoints while training goes on, from a copy in the memory of the host.
    on_nonfinite: after a loss or gradient that is not finite, or a spike: stop, skip the update's samples, or rewind to
    the last checkpoint and leave them out. hang_seconds: a rank that stands still so long ends the job (0 = never).
    """

    steps: int = Field(1000, ge=0)
    epochs: Positive | None = None
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(0, ge=0)
    validate_batches: int = Field(4, ge=1)
    sample_every: int = Field(0, ge=0)
    cosine_every: int = Field(0, ge=0, description="of the gradients of the AR and the NAR term, in TensorBoard")
    save_every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1, description="committed checkpoints kept")
    async_save: bool = True
    disk_patience: float = Field(600, ge=0.0, description="seconds to wait, paused, for a full disk; 0: end at once")
    resume: Literal["auto", "never"] = "auto"
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    max_skips: int = Field(3, ge=1, description="skips in a row, or rewinds without a new checkpoint; then stop")
    spike_factor: float = Field(0.0, ge=0.0, description="a spike is that many times the recent median; 0 = no spikes")
    hang_seconds: float = Field(45.0, ge=0.0)

    @field_validator("spike_factor")
    @classmethod
    def _spikes_are_higher(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError(f"must be 0 or more than 1, got {value}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, values: Any) -> Any:
        """`epochs` alone, or `steps` (1000 where neither is given)."""
        if not isinstance(values, dict):
            return values
        steps, epochs = values.get("steps"), values.get("epochs")
        if epochs is None and ("steps" not in values or steps not in (None, 0)):
            return values
        if (epochs is None) == (steps in (None, 0)):
            raise ValueError(
                f"give exactly one of `steps` and `epochs`, `steps` at least 1, got {steps!r} and {epochs!r}"
            )
        return {**values, "steps": 0}


class RunConfig(Section):
    """Everything `python -m pretrain train` needs; saved into the run folder as `config.yaml`.

    init_from: a bundle whose weights the run begins with; it also gives `model`, in which only dropouts may differ.
    """

    name: str = Field(pattern=NAME)
    runs: str = "runs"
    seed: int = Field(1, ge=0, lt=2**31)
    init_from: str | None = None
    data: DataConfig
    model: ModelConfig = ModelConfig()
    objective: dict[str, Any]
    batch: BatchConfig
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs) / self.name


SectionT = TypeVar("SectionT", bound=BaseModel)
MakeT = TypeVar("MakeT")


def load(kind: type[SectionT], path: str | Path, overrides: Sequence[str] = ()) -> SectionT:
    """Reads `path`, merges its optional `base:` below it and `overrides` above it, and validates.

    Args:
        kind: the section class to build, for example `RunConfig`.
        path: a YAML file; `base:` in it is relative to its folder and may not have a base of its own.
        overrides: `dotted.key=value` strings; the value is YAML (`optim.lr=1e-4`, `batch.tokens=null`).

    Raises:
        ConfigError: naming the file, the key, what it must be and what it was.
    """
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: `base` must be a file name, got {base!r}")
        below = read_yaml(Path(path).parent / base)
        if "base" in below:
            raise ConfigError(f"{path}: `base` ({base}) must not have a `base` itself")
        values = merge(below, values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override `{override}` must look like key=value")
        assign(values, key, parse_scalar(text, where=f"override `{override}`"))
    return validate(kind, values, where=str(path))


def validate(kind: type[SectionT], values: Any, where: str) -> SectionT:
    """Builds `kind` from plain `values`; raises `ConfigError` with every problem on one line."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_explain(kind, values, dict(one)) for one in error.errors()[:5])
        raise ConfigError(f"{where}: {problems}") from None


def choose(
    registry: Mapping[str, tuple[type[Section], MakeT]], options: Mapping[str, Any], section: str
) -> tuple[Section, MakeT]:
    """The options, validated and complete, and the maker that `options["name"]` names in a registry.

    Raises:
        ConfigError: the name or an option is unknown or out of range.
    """
    name = options.get("name")
    if not isinstance(name, str) or name not in registry:
        raise ConfigError(f"`{section}.name` must be one of {', '.join(registry)}, got {name!r}")
    kind, make = registry[name]
    return validate(kind, dict(options), where=section), make


def complete(
    registry: Mapping[str, tuple[type[Section], Any]], options: Mapping[str, Any], section: str
) -> dict[str, Any]:
    """`options` with the default of each one that was not given; raises as `choose` does."""
    return choose(registry, options, section)[0].model_dump(mode="json")


def dump(config: BaseModel) -> str:
    """The configuration as YAML text that `load` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of both; where both have a key that is no section, that of `above`."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets the value of a dotted key in nested `values`; raises ConfigError where a section is a value already."""
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override `{dotted}`: `{parent}` is a value, not a section")
        values = inner
    values[last] = value


def _named(values: Any, place: Sequence[str | int]) -> list[str]:
    """The part of `place` that people have written; behind it pydantic names the kinds that a value could be of."""
    found = []
    for part in place:
        if not (part in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(part, int)):
            break
        found.append(str(part))
        values = values[part]
    return found


def _explain(kind: type[BaseModel], values: Any, problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path if problem["type"] == "missing" else _named(values, problem["loc"])) or kind.__name__
    if problem["type"] == "extra_forbidden":
        section: Any = kind
        for part in path[:-1]:
            annotation = section.model_fields[part].annotation
            section = next(one for one in (annotation, *get_args(annotation)) if hasattr(one, "model_fields"))
        near = difflib.get_close_matches(path[-1], list(section.model_fields), n=1, cutoff=0.4)
        meant = ".".join([*path[:-1], *near])  # as it is given on the command line
        hint = f"did you mean `{meant}`?" if near else f"valid keys: {', '.join(section.model_fields)}"
        return f"unknown key `{name}`; {hint}"
    if problem["type"] == "missing":
        return f"`{name}` is required"
    if problem["type"] == "string_pattern_mismatch":
        return f"`{name}` must be {NAME_HINT}, got {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":
        return f"`{name}`: {message}"
    return f"`{name}` {message.replace('input should', 'must')}, got {problem['input']!r}"

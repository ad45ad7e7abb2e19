"""Every key of every configuration, wrong in every way: refused, by its path, with what it must be and what it was.

What is wrong for a key is worked out here from its annotation, not asked of the code that refuses it.
"""

import math
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
import yaml
from pydantic.fields import FieldInfo

from finetune import runners, tasks
from finetune.config import TuneConfig
from pretrain import objectives
from pretrain.config import RunConfig, Section, assign, validate
from pretrain.errors import ConfigError

Case = tuple[str, Any, str]  # dotted key, value, what the message must tell besides

RUN: dict[str, Any] = {
    "name": "n", "data": {"path": "d"}, "objective": {"name": "janus"}, "batch": {"samples": 8},
}  # fmt: skip
TUNE: dict[str, Any] = {
    "name": "n", "bundle": "b", "task": {"name": "pairs"}, "runner": {"name": "nar"}, "batch": {"samples": 8},
}  # fmt: skip
SAMPLES = ("text", "", 3, 2.5, True, None, [1, "x"], {"a": 1}, [[]], {})


def members(annotation: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The kinds that a value may be of, each with its constraints."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *constraints = get_args(annotation)
        for kind, more in members(inner):
            yield kind, (*more, *constraints)
    elif origin in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from members(one)
    else:
        yield annotation, ()


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of `kind` as YAML has it: no text for a number, no number for a switch, 3 for 3.0."""
    origin = get_origin(kind) or kind
    if origin is Any:
        return True
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in get_args(kind))
    if origin is float:
        return type(value) in (int, float)
    if origin in (tuple, list):
        return isinstance(value, list)
    if isinstance(origin, type) and issubclass(origin, Section | Mapping):
        return isinstance(value, dict)
    return type(value) is (type(None) if kind is None else origin)


def beyond(constraints: tuple[Any, ...]) -> Iterator[tuple[Any, str]]:
    """Numbers just outside of a range, each with the bound that the message must name."""
    for one in constraints:
        if isinstance(one, FieldInfo):
            yield from beyond(tuple(one.metadata))
        elif isinstance(one, annotated_types.Ge):
            yield from ((one.ge - 1, bound(one.ge)), (-(10**12), bound(one.ge)))
        elif isinstance(one, annotated_types.Gt):
            yield from ((one.gt, bound(one.gt)), (one.gt - 1, bound(one.gt)))
        elif isinstance(one, annotated_types.Le):
            yield from ((one.le + 1, bound(one.le)), (10**12, bound(one.le)))
        elif isinstance(one, annotated_types.Lt):
            yield from ((one.lt, bound(one.lt)), (one.lt + 1, bound(one.lt)))


def bound(number: float) -> str:
    return str(int(number) if number == int(number) else number)


def misspelt(name: str) -> set[str]:
    return {name + "s", name[:-1] or "x", name[1:] or "x", f"{name[0]}_{name[1:]}", name.upper(), name[::-1] + "_"}


def wrong(section: type[Section], path: str) -> Iterator[Case]:
    """Every way to get a key of `section` wrong."""
    prefix = f"{path}." if path else ""
    for name, field in section.model_fields.items():
        kinds = [(kind, (*more, *field.metadata)) for kind, more in members(field.annotation)]
        inner = next((k for k, _ in kinds if isinstance(k, type) and issubclass(k, Section)), None)
        for value in SAMPLES:
            # an empty or partial section, list or mapping may well be right
            if not any(fits(value, kind) for kind, _ in kinds):
                yield f"{prefix}{name}", value, "must"
        for kind, constraints in kinds:
            if get_origin(kind) is Literal:
                texts = [one for one in get_args(kind) if isinstance(one, str)]
                yield f"{prefix}{name}", (texts[0] + "_" if texts else 99), str(get_args(kind)[-1])
            for value, limit in beyond(constraints) if kind in (int, float) else ():
                yield f"{prefix}{name}", float(value) if kind is float else value, limit
            if kind is float:
                yield from ((f"{prefix}{name}", value, "must") for value in (math.nan, math.inf, -math.inf))
        for key in misspelt(name) - set(section.model_fields):
            yield f"{prefix}{key}", 1, "unknown key"
        if inner is not None:
            yield from wrong(inner, f"{prefix}{name}")


def refuse(kind: type[Section], values: dict[str, Any], key: str, value: Any, told: str) -> None:
    values = yaml.safe_load(yaml.safe_dump(values))
    assign(values, key, value)
    with pytest.raises(ConfigError) as error:
        validate(kind, values, where="a.yaml")
    message = str(error.value)
    last = key.rsplit(".", 1)[-1]
    assert "\n" not in message and len(message) < 1_500, message
    assert f"`{key}`" in message or f"`{last}`" in message, (key, value, message)
    assert told in message or "give exactly one of" in message, (key, value, message)
    if told != "unknown key":
        shown = repr(value)
        assert shown in message or repr(tuple(value) if isinstance(value, list) else value) in message, (key, message)


def options() -> Iterator[tuple[str, type[Section]]]:
    for registry in (objectives.REGISTRY, runners.REGISTRY, tasks.REGISTRY):
        for name, (kind, _) in registry.items():
            yield name, kind


@pytest.mark.fault("configuration fuzz", trials=1800)
def test_sections() -> None:
    tried = 0
    for kind, honest in ((RunConfig, RUN), (TuneConfig, TUNE)):
        validate(kind, honest, where="a.yaml")
        for key, value, told in wrong(kind, ""):
            refuse(kind, honest, key, value, told)
            tried += 1
    assert tried >= 1800


@pytest.mark.fault("configuration fuzz", trials=4000)
def test_options() -> None:
    tried = 0
    for name, kind in options():
        for key, value, told in wrong(kind, ""):
            refuse(kind, {"name": name}, key, value, told)
            tried += 1
    assert tried >= 4000


CONFLICTS = {
    "batch.tokens": (64, "`batch`: give exactly one of `samples` and `tokens`"),
    "batch.samples": (None, "`batch`: give exactly one of `samples` and `tokens`"),
    "train": ({"steps": 5, "epochs": 1.0}, "`train`: give exactly one of `steps` and `epochs`"),
    "model": ({"d_model": 30, "heads": 4}, "`d_model` must be a multiple of `heads` (4), got 30"),
    "model.heads": (7, "`d_model` must be a multiple of `heads` (7), got 256"),
}


@pytest.mark.fault("configuration fuzz")
@pytest.mark.parametrize("key", CONFLICTS)
def test_conflicts(key: str) -> None:
    values, (value, told) = yaml.safe_load(yaml.safe_dump(RUN)), CONFLICTS[key]
    assign(values, key, value)
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, values, where="a.yaml")
    assert told in str(error.value)

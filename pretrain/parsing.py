"""YAML and JSON of other hands, parsed strictly: bounded in size, without tags, aliases or keys that come twice."""

import json
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import ConfigError
from pretrain.plain import read_plain

MAX_CONFIG_BYTES = 1_000_000


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Parses a YAML mapping safely (no tags that run code, no duplicate keys, bounded size)."""
    try:
        text = read_plain(Path(path), MAX_CONFIG_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config `{path}` cannot be read: {error}") from None
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise ConfigError(f"config `{path}` is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config `{path}` must be a mapping of keys, got {type(values).__name__}")
    return values


def read_json(path: str | Path) -> dict[str, Any]:
    """Parses a JSON object, for settings that belong to another program."""
    try:
        values = json.loads(read_plain(Path(path), MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` must be readable JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"`{path}` must hold a JSON object, got {type(values).__name__}")
    return values


def parse_scalar(text: str, where: str) -> Any:
    """Parses the right-hand side of an override the way the YAML file itself is parsed."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and aliases and reads 1e-4 as a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not accepted")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen = set[str]()
        for key in keys:
            if not isinstance(key, str):
                raise yaml.YAMLError(f"keys must be text, got {key!r}")
            if key in seen:
                raise yaml.YAMLError(f"key `{key}` appears twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_number(loader: _StrictLoader, node: Any) -> Any:
    # YAML 1.1 reads 1e-4 as text because it has no dot; people write learning rates that way.
    text = loader.construct_scalar(node)
    try:
        return float(text) if node.style is None and "e" in text.lower() and text[0] in "+-.0123456789" else text
    except ValueError:
        return text


_StrictLoader.add_constructor("tag:yaml.org,2002:str", _construct_number)

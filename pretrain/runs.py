"""The folder of a run: `runs/<name>/{config.yaml, env.json, checkpoints/, latest, tb/, samples/, events.jsonl}`."""

import copy
import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel

from pretrain import config as configuration
from pretrain.checkpoints.commit import disk_errors
from pretrain.data.files import write_atomic
from pretrain.data.manifest import Manifest
from pretrain.distributed import World, count_hosts
from pretrain.errors import CheckpointError, ConfigError, DataError, LostRank
from pretrain.flatten import flatten
from pretrain.plain import read_plain

CONFIG, ENVIRONMENT, EVENTS, BOARD, SAMPLES = "config.yaml", "env.json", "events.jsonl", "tb", "samples"
LARGEST_JOURNAL = 1 << 28  # a million events
ConfigT = TypeVar("ConfigT", bound=BaseModel)
PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "safetensors", "pydantic")


def read_config(run_dir: Path, kind: type[ConfigT]) -> ConfigT | None:
    """The configuration the run was last started with; None where there is none.

    Raises:
        CheckpointError: config.yaml is no plain file. ConfigError: it is damaged.
    """
    path = run_dir / CONFIG
    if not path.exists():
        return None
    if not path.is_file():
        raise CheckpointError(f"`{path}` must be the configuration of a run, is not a plain file")
    return configuration.load(kind, path)


def check_continues(
    config: BaseModel, before: BaseModel, run_dir: Path, fixed: Sequence[str], free: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """What changed, {key: [before, now]}, since the run was last started.

    fixed: keys or sections that must stay as they were; free: exceptions inside them.

    Raises:
        ConfigError: naming the first changed key that must stay.
    """
    old, new = flatten(before.model_dump(mode="json")), flatten(config.model_dump(mode="json"))
    keys = sorted(old.keys() | new.keys())
    changed = {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}
    for key, (was, now) in changed.items():
        if _within(key, fixed) and not _within(key, free):
            raise ConfigError(
                f"`{key}` must stay {was!r} in run `{run_dir}`, got {now!r}: continue with the old value or "
                "choose another `name`"
            )
    return changed


def fixed_values(config: BaseModel, fixed: Sequence[str], free: Sequence[str] = ()) -> dict[str, Any]:
    """{key or section of `fixed`: its value}, without what is `free`: what each checkpoint keeps of a configuration.

    config.yaml can be edited by hand between two starts, a checkpoint cannot.
    """
    values = config.model_dump(mode="json")
    for key in free:
        section, _, name = key.rpartition(".")
        (value_of(values, section) or {}).pop(name, None)
    return {key: value_of(values, key) for key in fixed}


def with_fixed(config: ConfigT, saved: Any, free: Sequence[str] = ()) -> ConfigT:
    """`config` with what a checkpoint keeps of it in `saved`, by `fixed_values`; an older one keeps nothing.

    Raises:
        CheckpointError: that is no configuration.
    """
    if not isinstance(saved, dict):
        return config
    values = config.model_dump(mode="json")
    try:
        for key, value in copy.deepcopy(saved).items():
            kept = {one: value_of(values, one) for one in free if _within(one, [key])}
            for name, put in {key: value, **kept}.items():
                configuration.assign(values, name, put)
        return configuration.validate(type(config), values, where="what the checkpoint keeps of its configuration")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def edited(values: Mapping[str, Any], saved: Any) -> dict[str, list[Any]]:
    """{key: [as saved, now]} where the nested `values` of a config.yaml are not what a checkpoint keeps of them."""
    kept = flatten(saved) if isinstance(saved, dict) else {}
    return {key: [was, now] for key, was in kept.items() if (now := value_of(values, key)) != was}


def value_of(values: Any, dotted: str) -> Any:
    """The value of a dotted key in nested `values`; None where it is absent."""
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def fingerprint(manifest: Manifest) -> dict[str, Any]:
    """What makes two data folders one to a run: the samples, their text and their tokenizer."""
    shards = hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
    return {
        "index_sha256": manifest.index_sha256,
        "shards_sha256": shards,
        "tokenizer_sha256": manifest.tokenizer_sha256,
    }


def check_data(saved: Any, now: Mapping[str, Any], given_by: str, run_dir: Path) -> None:
    """Compares the data that a checkpoint was trained on with what the configuration key `given_by` gives now.

    Raises:
        DataError: naming the first thing in `now` that is not as it was.
    """
    for key, value in now.items():
        was = saved.get(key) if isinstance(saved, dict) else None
        if was != value:
            raise DataError(
                f"`{given_by}` must give the data that run `{run_dir}` began with: `{key}` was {was!s:.80}, "
                f"is {value!s:.80}"
            )


def describe_environment(world: World, backend: str) -> dict[str, Any]:
    """Versions, hosts and devices, for env.json and provenance.json; collective."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "ranks": world.size,
        "hosts": count_hosts(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "kernels": backend,
    }


def version(package: str) -> str | None:
    """Installed version of `package`; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_text(path: Path, text: str) -> None:
    """Replaces `path` in one step; raises DiskError where the disk is full, over quota or read-only."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replaces `path` with `values` as JSON in one step."""
    write_text(path, json.dumps(values, indent=1) + "\n")


class Events:
    """`events.jsonl`: one line for everything a run went through, appended by rank 0."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / EVENTS

    def add(self, event: str, step: int, **details: Any) -> None:
        """Appends {"time", "host", "pid", "event", "step", ...}; on disk when it returns.

        Raises:
            DiskError: the disk is full, over quota or read-only.
        """
        line = {"time": round(time.time(), 3), "host": socket.gethostname(), "pid": os.getpid(), "event": event}
        text = json.dumps({**line, "step": step, **details}) + "\n"
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with disk_errors(self.path), os.fdopen(os.open(self.path, flags, 0o666), "rb+") as file:
            # A kill or a full disk may have cut the last line short: what follows must not be glued to it.
            size = file.seek(0, os.SEEK_END)
            whole = size == 0 or os.pread(file.fileno(), 1, size - 1) == b"\n"
            file.write(("" if whole else "\n").encode() + text.encode())
            file.flush()
            os.fsync(file.fileno())


def record_lost(run_dir: Path, text: str) -> None:
    """Writes into the journal of a run, if it has begun one, why its ranks were ended; from any rank and thread."""
    if (run_dir / EVENTS).exists():
        step = next((event["step"] for event in reversed(read_events(run_dir)) if "step" in event), 0)
        Events(run_dir).add("error", step, kind=LostRank.__name__, message=text)


def read_journal(run_dir: Path) -> list[str]:
    """The lines of events.jsonl; raises CheckpointError where it is missing, no plain file or endless."""
    path = run_dir / EVENTS
    try:
        return read_plain(path, LARGEST_JOURNAL).decode(errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"`{run_dir}` must be the folder of a run, it has no {EVENTS}") from None
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error.strerror}") from None


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Every whole line of events.jsonl; a line that a kill cut short is left out."""
    found = []
    for line in read_journal(run_dir):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)

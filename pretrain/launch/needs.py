"""What a configuration asks of the hosts: ranks, samples, memory and disk. Reads the data, writes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain import config
from pretrain.assemble import build_module, build_stream, complete_config, inherits
from pretrain.config import RunConfig
from pretrain.cost.memory import Memory, checkpoint_bytes, rank_memory
from pretrain.data.dataset import ShardDataset
from pretrain.distributed import World
from pretrain.launch.hostfile import Host
from pretrain.parsing import read_yaml
from pretrain.train import complete_options


@dataclass(frozen=True)
class Share:
    """What the ranks of one host compute of the first update. micros: micro-batches of each of them."""

    samples: int
    tokens: int
    micros: int


@dataclass(frozen=True)
class Needs:
    """files: that every rank reads before the data. memory: of a rank, without activations, by kind of device.

    disk: bytes of the checkpoints that lie there at once. shares: {host: its share}.
    """

    settings: RunConfig
    files: Sequence[str]
    memory: Mapping[str, Memory]
    disk: int
    shares: Mapping[str, Share]


def needs(config_path: str | Path, overrides: Sequence[str], hosts: Sequence[Host]) -> Needs:
    """Raises whatever `train` would refuse, as a ParlanceError."""
    settings = complete_options(config.load(RunConfig, config_path, overrides))
    dataset = ShardDataset(settings.data.path, settings.data.on_bad_shard)
    inherited = inherits(settings)
    completed = complete_config(settings, dataset).model_copy(update={"init_from": None})
    ranks = max(1, sum(host.slots for host in hosts))
    with torch.device("meta"):
        module = build_module(completed, dataset)
    stream = build_stream(completed, dataset, module.objective, World(0, ranks, 0, torch.device("cpu")))
    step = stream.plan_step(0, ranks)
    lengths = [stream.corpus.length(source, index) for source, index in step.samples]

    def share(host: Host) -> Share:
        taken = [at - step.first for rank in host.ranks for micro in step.micro[rank] for at in micro]
        return Share(len(taken), sum(lengths[at] for at in taken), len(step.micro[host.first]))

    return Needs(
        settings=settings,
        files=_files(config_path, settings),
        memory={
            device: rank_memory(module, completed.model, completed.engine, ranks, device, 0, inherited)
            for device in ("cpu", "cuda")
        },
        disk=(completed.train.keep + 1) * checkpoint_bytes(module, ranks),
        shares={host.name: share(host) for host in hosts},
    )


def _files(config_path: str | Path, settings: RunConfig) -> list[str]:
    files, base = [str(config_path)], read_yaml(config_path).get("base")
    if base is not None:
        files.append(str(Path(config_path).parent / base))
    if settings.init_from is not None:  # its manifest holds the hashes of all the rest
        files.append(str(Path(settings.init_from) / "manifest.json"))
    return files

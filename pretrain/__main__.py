"""The command line: `python -m pretrain COMMAND ...`, also under `deepspeed --module` and torchrun.

A command is one function that adds its arguments and names what to run; heavy imports happen when it runs.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import cache

from pretrain import command_line
from pretrain.command_line import Commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code that `pretrain.errors` documents."""
    commands = (
        _prepare, _plan, _train, _launch_check, _slurm, _verify, _status, _doctor, _handoff, _import_bart, _export_bart,
    )  # fmt: skip
    about = "Pre-train encoder-decoder language models that write in parallel."
    return command_line.run("pretrain", about, commands, arguments)


def _prepare(commands: Commands) -> None:
    parser = commands.add_parser("prepare", help="text -> shards, manifest, index and tokenizer")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards; continued if begun before")
    parser.add_argument(
        "--source", action="append", default=[], dest="sources", metavar="NAME=KIND:WHERE",
        help="stdlib-docs (needs neither name nor place), text:GLOB (a document per blank-line block), "
        "text-file:GLOB (per file), jsonl:GLOB[#FIELD], parquet:GLOB[#FIELD], webdataset:GLOB[#FIELD] or "
        "hf:ID[/CONFIG][@REVISION][#FIELD]; repeatable",
    )  # fmt: skip
    parser.add_argument("--sources", dest="source_file", metavar="YAML", help="more of them, as NAME: KIND:WHERE lines")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer", metavar="PATH_OR_ID", help="a tokenizer.json, its folder, BART's files, or a Hub id"
    )
    tokenizer.add_argument("--train-tokenizer", type=int, metavar="VOCAB", help="train byte-level BPE of this size")
    parser.add_argument("--workers", type=_positive, default=max(1, (os.cpu_count() or 2) - 1), metavar="N")
    parser.add_argument("--max-length", type=_positive, default=512, metavar="L", help="tokens of a sample at most")
    parser.add_argument(
        "--valid-permille", type=int, default=10, metavar="N", help="documents of 1,000 kept for validation; default 10"
    )
    parser.add_argument("--licence", default="not stated", metavar="NAME", help="of your text, for the manifest")
    parser.set_defaults(run=_run_prepare)


def _run_prepare(given: argparse.Namespace) -> None:
    from pretrain.data.prepare import prepare
    from pretrain.data.sources import read_specs

    prepare(
        given.out,
        [*given.sources, *(read_specs(given.source_file) if given.source_file else ())],
        tokenizer=given.tokenizer,
        train_vocab=given.train_tokenizer,
        workers=given.workers,
        max_length=given.max_length,
        valid_permille=given.valid_permille,
        licence=given.licence,
    )


def _plan(commands: Commands) -> None:
    parser = commands.add_parser("plan", help="what a configuration will take: memory, disk, time; starts nothing")
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    parser.add_argument("--ranks", type=_positive, default=1, metavar="N", help="processes it will be started with")
    parser.add_argument(
        "--measure", action=argparse.BooleanOptionalAction, default=None, help="run a few updates here to tell the time"
    )
    parser.add_argument(
        "--simulate", metavar="NODESxGPUS", help="batches, messages and an estimated time on a cluster, for example 4x8"
    )
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=NUMBER",
        help="for --simulate: gpu (GB of memory), peak_tflops and reached (a part of 1) of a GPU, node_gb and "
        "network_gb (GB/s it sends inside and out of its machine), pcie_gb (GB/s between it and its host), host_gb "
        "(GB/s of a machine's memory); repeatable",
    )  # fmt: skip
    parser.set_defaults(run=_run_plan)


def _run_plan(given: argparse.Namespace) -> None:
    from pretrain.report.plan import plan

    plan(given.config, given.overrides, given.ranks, given.measure, given.simulate, given.assume)


def _train(commands: Commands) -> None:
    parser = commands.add_parser("train", help="train, or continue, the run that a configuration describes")
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-4")
    parser.add_argument(
        "--deepspeed_config", metavar="JSON", help="DeepSpeed settings of your own, merged in; a conflict is an error"
    )
    parser.set_defaults(run=_run_train)


def _run_train(given: argparse.Namespace) -> None:
    from pretrain.train import main as train

    train(given.config, given.overrides, given.deepspeed_config)


def _slurm(commands: Commands) -> None:
    from pretrain.launch import slurm

    parser = commands.add_parser("slurm", help="print a Slurm job that trains, and copy the code for it: > job.sbatch")
    slurm.add_arguments(parser)
    parser.add_argument("--deepspeed_config", metavar="JSON", help="as for train")
    parser.set_defaults(run=_run_slurm)


def _run_slurm(given: argparse.Namespace) -> None:
    import torch

    from pretrain import config, train
    from pretrain.assemble import complete_config
    from pretrain.data.dataset import ShardDataset
    from pretrain.distributed import World
    from pretrain.launch.slurm import Checked, write_job
    from pretrain.parsing import read_json

    opened = cache(ShardDataset)  # elements of a job array share their data
    world = World(0, given.nodes * max(1, given.gpus_per_node), 0, torch.device("cpu"))

    def load(overrides: Sequence[str]) -> Checked:
        settings = train.complete_options(config.load(config.RunConfig, given.config, overrides))
        world.divided(settings.engine.tensor_parallel)
        complete_config(settings, opened(settings.data.path, settings.data.on_bad_shard))
        return Checked(settings.name, settings.run_dir, config.dump(settings), settings.data.workers)

    user = read_json(given.deepspeed_config) if given.deepspeed_config else None
    write_job("pretrain", given, load, {} if user is None else {"deepspeed_config": json.dumps(user).encode()})


def _launch_check(commands: Commands) -> None:
    parser = commands.add_parser("launch-check", help="can deepspeed start training on these hosts; starts nothing")
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    parser.add_argument("--hostfile", required=True, metavar="FILE", help="`HOST slots=N` lines, as for deepspeed")
    parser.add_argument("--master_port", type=_positive, default=29500, metavar="N", help="as for deepspeed")
    parser.add_argument("--master_addr", metavar="ADDRESS", help="of the first host, as for deepspeed")
    parser.add_argument("--ssh_port", type=_positive, metavar="N", help="as for deepspeed")
    parser.set_defaults(run=_run_launch_check)


def _run_launch_check(given: argparse.Namespace) -> None:
    from pretrain.launch.check import Rendezvous, launch_check

    where = Rendezvous(given.master_addr, given.master_port, given.ssh_port)
    launch_check(given.hostfile, given.config, given.overrides, where)


def _verify(commands: Commands) -> None:
    parser = commands.add_parser("verify", help="every bit and number of a data folder, run, checkpoint or bundle")
    parser.add_argument("path", metavar="DIR_OR_RUN", help="for example data/docs, runs/quickstart, bundles/quickstart")
    parser.set_defaults(run=_run_verify)


def _run_verify(given: argparse.Namespace) -> None:
    from pretrain.report.verify import verify

    verify(given.path)


def _status(commands: Commands) -> None:
    parser = commands.add_parser("status", help="is a run alive, how far, how long still, how much time was lost")
    parser.add_argument("run_dir", metavar="RUN", help="folder of the run, for example runs/quickstart")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_run_status)


def _run_status(given: argparse.Namespace) -> None:
    from pretrain.report.status import status

    status(given.run_dir, given.json)


def _doctor(commands: Commands) -> None:
    parser = commands.add_parser("doctor", help="can training start here: versions, devices, ranks, ports, disk")
    parser.set_defaults(run=_run_doctor)


def _run_doctor(given: argparse.Namespace) -> None:
    from pretrain.report.doctor import doctor

    doctor()


def _handoff(commands: Commands) -> None:
    parser = commands.add_parser("handoff", help="last verified checkpoint of a run -> bundle for fine-tuning")
    parser.add_argument("run_dir", metavar="RUN", help="folder of the run, for example runs/quickstart")
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="folder to write")
    parser.set_defaults(run=_run_handoff)


def _run_handoff(given: argparse.Namespace) -> None:
    from pretrain.bundles.handoff import handoff

    handoff(given.run_dir, given.out)


def _import_bart(commands: Commands) -> None:
    parser = commands.add_parser("import-bart", help="a published BART -> bundle, to tune or to continue (init_from)")
    parser.add_argument("model", metavar="PATH_OR_ID", help="folder (Hugging Face or fairseq), *.pt file, or a Hub id")
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="folder to write")
    parser.add_argument("--tokenizer", metavar="PATH_OR_ID", help="where the tokenizer is, if not in the same folder")
    parser.set_defaults(run=_run_import_bart)


def _run_import_bart(given: argparse.Namespace) -> None:
    from pretrain.bundles.bart import import_bart

    import_bart(given.model, given.out, given.tokenizer)


def _export_bart(commands: Commands) -> None:
    parser = commands.add_parser("export-bart", help="bundle -> folder that transformers' BART loads")
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of a bundle")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.set_defaults(run=_run_export_bart)


def _run_export_bart(given: argparse.Namespace) -> None:
    from pretrain.bundles.bart import export_bart

    export_bart(given.bundle, given.out)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m pretrain COMMAND ...`, also under `deepspeed --module` and torchrun.

A command is one function that adds its arguments and names what to run; heavy imports happen when it runs.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from pretrain import command_line
from pretrain.command_line import Commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code that `pretrain.errors` documents."""
    return command_line.run(
        "pretrain",
        "Pre-train encoder-decoder language models that write in parallel.",
        (_prepare, _train, _handoff),
        arguments,
    )


def _prepare(commands: Commands) -> None:
    parser = commands.add_parser("prepare", help="text -> shards, manifest, index and tokenizer")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards; continued if begun before")
    parser.add_argument(
        "--source", required=True, action="append", dest="sources", metavar="[NAME=]KIND[:GLOB]",
        help="stdlib-docs, text:GLOB (a document per blank-line block) or text-file:GLOB (per file); repeatable",
    )  # fmt: skip
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", metavar="PATH_OR_ID", help="a tokenizer.json, its folder, or a Hub id")
    tokenizer.add_argument("--train-tokenizer", type=int, metavar="VOCAB", help="train byte-level BPE of this size")
    parser.add_argument("--workers", type=_positive, default=max(1, (os.cpu_count() or 2) - 1), metavar="N")
    parser.add_argument("--max-length", type=_positive, default=512, metavar="L", help="tokens of a sample at most")
    parser.set_defaults(run=_run_prepare)


def _run_prepare(given: argparse.Namespace) -> None:
    from pretrain.data.prepare import prepare

    prepare(
        given.out,
        given.sources,
        tokenizer=given.tokenizer,
        train_vocab=given.train_tokenizer,
        workers=given.workers,
        max_length=given.max_length,
    )


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


def _handoff(commands: Commands) -> None:
    parser = commands.add_parser("handoff", help="last verified checkpoint of a run -> bundle for fine-tuning")
    parser.add_argument("run_dir", metavar="RUN", help="folder of the run, for example runs/quickstart")
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="folder to write")
    parser.set_defaults(run=_run_handoff)


def _run_handoff(given: argparse.Namespace) -> None:
    from pretrain.handoff import handoff

    handoff(given.run_dir, given.out)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m finetune COMMAND ...`, also under `deepspeed --module` and torchrun.

A command is one function that adds its arguments and names what to run; heavy imports happen when it runs.
"""

import argparse
import sys
from collections.abc import Sequence

from pretrain import command_line
from pretrain.command_line import Commands
from pretrain.errors import UsageError

SAMPLING = ("sample", "temperature", "top_k", "seed")
# Decoder options that each mode takes; they are named like the arguments.
OPTIONS = {
    "ar": ("beam", "length_penalty", "no_repeat_ngram", "n_best", *SAMPLING, "max_length"),
    "nar": ("iterations", "length_beam", "length_choice", "early_stop", "max_length"),
    "hard_exit": ("threshold", "rows", "test_layers", "max_length"),
    "soft_exit": ("max_length",),
    "draft": ("block", "compare", "max_length"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code that `pretrain.errors` documents."""
    return command_line.run(
        "finetune",
        "Tune a hand-off bundle for a task, write texts with it, score them.",
        (_begin, _train, _slurm, _generate, _score, _sweep_threshold, _stats, _report, _reproduce),
        arguments,
    )


def _begin(commands: Commands) -> None:
    parser = commands.add_parser("begin", help="make a bundle of random weights, to train a task's model from scratch")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of `train`: its task, its seed, and where to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of CONFIG; `model.key=value` of MODEL")
    parser.add_argument("--model", required=True, metavar="MODEL", help="YAML file with a section `model`")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--train-tokenizer", type=int, metavar="VOCAB", help="byte-level BPE on both sides of the training pairs"
    )
    tokenizer.add_argument("--tokenizer", metavar="PATH_OR_ID", help="as in `pretrain prepare`")
    parser.add_argument("--out", metavar="BUNDLE", help="folder to write; default: the `bundle` of CONFIG")
    parser.add_argument(
        "--query-position-offset", type=int, choices=(0, 1), default=1, help="0 is the released translation code"
    )
    parser.set_defaults(run=_run_begin)


def _run_begin(given: argparse.Namespace) -> None:
    from finetune.begin import begin

    vocabulary = given.train_tokenizer
    offset = given.query_position_offset
    begin(given.config, given.overrides, given.model, given.tokenizer, vocabulary, given.out, offset)


def _train(commands: Commands) -> None:
    parser = commands.add_parser("train", help="tune, or continue to tune, a bundle for a task; writes RUN/bundle")
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-4 or preset=smoke")
    parser.set_defaults(run=_run_train)


def _run_train(given: argparse.Namespace) -> None:
    from finetune.train import main as train

    train(given.config, given.overrides)


def _slurm(commands: Commands) -> None:
    from pretrain.launch import slurm

    parser = commands.add_parser("slurm", help="print a Slurm job that tunes, and copy the code for it: > job.sbatch")
    slurm.add_arguments(parser)
    parser.set_defaults(run=_run_slurm)


def _run_slurm(given: argparse.Namespace) -> None:
    from finetune import train
    from finetune.config import TuneConfig, with_presets
    from pretrain import config
    from pretrain.bundles.bundle import read_description
    from pretrain.launch.slurm import Checked, write_job

    def load(overrides: Sequence[str]) -> Checked:
        settings = train.complete_options(config.load(TuneConfig, given.config, with_presets(overrides)))
        read_description(settings.bundle)
        return Checked(settings.name, settings.run_dir, config.dump(settings), settings.workers)

    write_job("finetune", given, load, {})


def _generate(commands: Commands) -> None:
    parser = commands.add_parser("generate", help="write a text for each line of a file; killed, it goes on")
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of a hand-off bundle, tuned or not")
    parser.add_argument("--mode", required=True, choices=tuple(OPTIONS), help="how to write")
    parser.add_argument("--input", required=True, metavar="FILE", help="one source a line; - is stdin")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="one text a line, in the same order; - is stdout"
    )
    parser.add_argument("--max-length", type=int, metavar="L", help="longest text in tokens, BOS and EOS counted")
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="N", help="source tokens of a batch at most")
    parser.add_argument("--dedup", action="store_true", help="leave out a token equal to the one before it; reported")
    parser.add_argument("--scores", action="store_true", help="lines of source number, score and text, tabs between")
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier call left, begin anew")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--eager", action="store_true", help="on a GPU, do without CUDA graphs")
    left_to_right = parser.add_argument_group("with --mode ar")
    left_to_right.add_argument("--beam", type=int, metavar="B", help="hypotheses; 1 is greedy")
    left_to_right.add_argument("--length-penalty", type=float, metavar="P", help="score = log-probability / length**P")
    left_to_right.add_argument("--no-repeat-ngram", type=int, metavar="N", help="no N tokens come twice in a text")
    left_to_right.add_argument(
        "--n-best", type=int, metavar="N", help="lines a source, best first, N <= --beam; or samples"
    )
    left_to_right.add_argument("--sample", action="store_true", default=None, help="draw tokens in place of a beam")
    left_to_right.add_argument("--temperature", type=float, metavar="T", help="of --sample; below 1 is surer")
    left_to_right.add_argument("--top-k", type=int, metavar="K", help="--sample only among the K likeliest tokens")
    left_to_right.add_argument("--seed", type=int, metavar="S", help="of --sample; every line has draws of its own")
    parallel = parser.add_argument_group("with --mode nar")
    parallel.add_argument("--iterations", type=int, metavar="K", help="refinements: K + 1 decoder passes")
    parallel.add_argument("--length-beam", type=int, metavar="K", help="candidate lengths")
    parallel.add_argument("--length-choice", choices=("contiguous", "topk"), help="around the likeliest, or likeliest")
    parallel.add_argument("--early-stop", action="store_true", default=None, help="stop a text that no longer changes")
    leaving = parser.add_argument_group("with --mode hard_exit")
    leaving.add_argument("--threshold", type=float, metavar="D", help="nats: a token leaves where its entropy is below")
    leaving.add_argument("--rows", choices=("fixed", "predicted"), help="as many as --max-length, or as predicted")
    leaving.add_argument("--test-layers", type=_layers, metavar="N,..", help="layers after which tokens may leave")
    drafting = parser.add_argument_group(
        "with --mode draft, the text of --mode ar --beam 1; for bundles with ar and nar"
    )
    drafting.add_argument(
        "--block", type=int, metavar="N", help="tokens drafted at once, and verified in the next pass"
    )
    drafting.add_argument(
        "--compare", action="store_true", default=None, help="write by greedy search too: speed-up, texts that differ"
    )
    parser.set_defaults(run=_run_generate)


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers of layers with commas between, got {text!r}") from None


def _run_generate(given: argparse.Namespace) -> None:
    from finetune.write_file import generate

    options = {}
    for name in {name for names in OPTIONS.values() for name in names}:
        value = getattr(given, name)
        if value is not None and name not in OPTIONS[given.mode]:
            raise UsageError(f"`--{name.replace('_', '-')}` must not be given with `--mode` {given.mode}")
        if value is not None:
            options[name] = value
    if given.batch_tokens < 1:
        raise UsageError(f"`--batch-tokens` must be at least 1, got {given.batch_tokens}")
    files = given.input, given.output
    rest = given.batch_tokens, given.dedup, given.device, given.scores, given.restart, given.eager
    generate(given.bundle, given.mode, *files, options, *rest)


def _score(commands: Commands) -> None:
    parser = commands.add_parser("score", help="ROUGE, BLEU and other metrics of texts against references")
    parser.add_argument("--task", metavar="TASK", help="scores with the metrics of a task: stdlib-summaries")
    parser.add_argument("--metrics", metavar="A,B,..", help="scores with these, after those of the task")
    parser.add_argument("--hyp", required=True, metavar="FILE", help="one text a line")
    parser.add_argument("--ref", required=True, metavar="FILE", help="one reference a line")
    parser.add_argument(
        "--src", metavar="FILE", help="one source a line; coco_* and meteor take lines with the same one as one item"
    )
    parser.add_argument("--against", metavar="FILE", help="texts of another system: paired bootstrap, p-values")
    parser.add_argument(
        "--fix-tokenization",
        action="store_true",
        help="coco_* and meteor of texts that are tokens of BERT-uncased: make words of them first, as GLGE does",
    )
    parser.add_argument("--no-stemmer", action="store_true", help="compare words in ROUGE, not their Porter stems")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run_score)


def _run_score(given: argparse.Namespace) -> None:
    from finetune.scores.command import score_files

    if not given.task and not given.metrics:
        raise UsageError("`score` must be given `--task` or `--metrics`, got neither")
    metrics = given.metrics.split(",") if given.metrics else []
    files = given.hyp, given.ref, given.task, metrics, given.src, given.against
    score_files(*files, not given.no_stemmer, given.json, given.fix_tokenization)


def _sweep_threshold(commands: Commands) -> None:
    parser = commands.add_parser(
        "sweep-threshold", help="quality, exit layers, operations and time of hard exits by threshold: table and PNG"
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of a bundle with mode hard_exit")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="PAIRS", help="TSV of source and target, or two parallel files"
    )
    parser.add_argument("--thresholds", type=float, nargs="+", metavar="D", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--output", default="sweep-threshold.png", metavar="FILE", help="the picture")
    parser.add_argument("--rows", choices=("fixed", "predicted"), help="as in generate")
    parser.add_argument("--test-layers", type=_layers, metavar="N,..", help="as in generate")
    parser.add_argument("--max-length", type=int, metavar="L", help="as in generate")
    parser.add_argument("--sentences", type=int, metavar="N", help="the first N pairs only")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(run=_run_sweep_threshold)


def _run_sweep_threshold(given: argparse.Namespace) -> None:
    from finetune.sweep import sweep_threshold

    if given.sentences is not None and given.sentences < 1:
        raise UsageError(f"`--sentences` must be at least 1, got {given.sentences}")
    names = ("rows", "test_layers", "max_length")
    options = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    data = given.data[0] if len(given.data) == 1 else given.data
    sweep_threshold(given.bundle, data, given.thresholds, given.output, options, given.sentences, given.device)


def _stats(commands: Commands) -> None:
    parser = commands.add_parser("stats", help="counts and mean lengths of a task, beside what papers say of it")
    parser.add_argument("task", metavar="TASK", help="for example multi30k")
    parser.add_argument("overrides", nargs="*", metavar="task.key=value", help="for example task.path=data/multi30k")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run_stats)


def _run_stats(given: argparse.Namespace) -> None:
    from finetune.stats import stats

    stats(given.task, given.overrides, given.json)


def _report(commands: Commands) -> None:
    parser = commands.add_parser(
        "report", help="a page with pictures about tuning runs: scores, latency, losses, exits, cost, samples"
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a tuning run that has its bundle")
    parser.add_argument("--out", default="runs/report", metavar="FOLDER", help="report.md, its pictures, the texts")
    parser.add_argument("--sentences", type=int, default=100, metavar="N", help="write the first N pairs")
    parser.add_argument("--shown", type=int, default=8, metavar="N", help="of these are shown side by side")
    parser.add_argument("--split", choices=("test", "valid"), default="test", help="which pairs")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5], metavar="B", help="of --mode ar")
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 1, 4, 10], metavar="K", help="of --mode nar")
    parser.add_argument("--metrics", metavar="A,B,..", help="score by these, not by those of the task")
    parser.add_argument("--cards", action="store_true", help="put the scores into the model card of each bundle, too")
    parser.add_argument("--restart", action="store_true", help="write again what an earlier call has written")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(run=_run_report)


def _run_report(given: argparse.Namespace) -> None:
    from finetune.report.command import report

    numbers = given.sentences, given.shown, given.split, given.beams, given.iterations
    metrics = given.metrics.split(",") if given.metrics else []
    report(given.runs, given.out, *numbers, given.device, given.restart, metrics, given.cards)


def _reproduce(commands: Commands) -> None:
    parser = commands.add_parser("reproduce", help="train and score what the papers claim; killed, it goes on")
    parser.add_argument("config", metavar="STUDY", help="YAML file: configs/reproduce/cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data=DIR or jobs=4")
    parser.add_argument("--hours", type=float, metavar="H", help="save and stop after them; default: when all is done")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="STEP", help="beginnings of steps' names, for example train/multi30k"
    )
    parser.add_argument("--out", default="RESULTS.md", metavar="FILE", help="the page; default RESULTS.md")
    parser.set_defaults(run=_run_reproduce)


def _run_reproduce(given: argparse.Namespace) -> None:
    from finetune.reproduce.command import reproduce

    reproduce(given.config, given.overrides, given.hours, given.only, given.out)


if __name__ == "__main__":
    sys.exit(main())

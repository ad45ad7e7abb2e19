"""`score`: files in, a table or one JSON object out."""

import json
from collections.abc import Mapping, Sequence

from finetune import tasks
from finetune.scores import Scores, score
from finetune.scores.significance import Paired, paired_bootstrap
from finetune.tasks.pairs import read_lines
from pretrain.errors import ConfigError, DataError


def score_files(
    hypotheses: str,
    references: str,
    task: str | None = None,
    metrics: Sequence[str] = (),
    sources: str | None = None,
    against: str | None = None,
    stemmer: bool = True,
    as_json: bool = False,
    fix_tokenization: bool = False,
) -> None:
    """Prints the scores of a file of texts, and beside them those of another system with the p of each difference.

    Args:
        hypotheses, references, sources, against: files of one text a line; `against` holds the other system's texts.
        task: its metrics come first.
        metrics: names in `finetune.scores.METRICS`.
        stemmer, fix_tokenization: as in `score`; of both systems.

    Raises:
        ConfigError, DataError: as `score`; or no metric asked for has a paired test.
    """
    of_task = tasks.build({"name": task}).metrics if task else ()
    names = list(dict.fromkeys([*of_task, *(name.strip() for name in metrics)]))
    lines, texts = read_lines(references), read_lines(hypotheses)
    of_sources = None if sources is None else read_lines(sources)
    rest = names, stemmer, of_sources, fix_tokenization
    others = None if against is None else read_lines(against)
    for file, read in ((hypotheses, texts), (sources, of_sources), (against, others)):
        if read is not None and len(read) != len(lines):
            raise DataError(f"`{file}` must have as many lines as `{references}`, {len(lines)}, it has {len(read)}")
    scores = score(texts, lines, *rest)
    tests = None
    if others is not None:
        tests = paired_bootstrap(scores.results, score(others, lines, *rest).results)
        if not tests:
            raise ConfigError(f"`--against` needs a metric that has a paired test, {', '.join(names)} have none")
    if as_json:
        found = {} if tests is None else {"against": {name: test.to_json() for name, test in tests.items()}}
        print(json.dumps(scores.to_json() | found))
    else:
        print("\n".join(table(scores, tests)))


def table(scores: Scores, tests: Mapping[str, Paired] | None = None) -> list[str]:
    """A line a metric: name, value, signature; with `tests` the other system's value and p beside it."""
    width = max(map(len, scores.results))
    lines = []
    if tests is not None:
        lines.append(f"{'':{width}} {'value':>7} {'against':>8} {'p':>7}")
    for name, result in scores.results.items():
        line = f"{name:{width}} {result.value:7.2f}"
        signature = result.signature
        if tests is not None and name in tests:
            test = tests[name]
            line += f" {test.against:8.2f} {test.p_value:7.4f}"
            signature += f"   p: {test.signature}"
        elif tests is not None:
            line += f" {'no test':>16}"
        lines.append(f"{line}   {signature}")
    few = [f"{count} of {scores.lines} {side}" for side, count in scores.empty.items() if count]
    return [*lines, *([f"empty: {', '.join(few)}"] if few else [])]

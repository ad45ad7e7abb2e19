"""What survives deepspeed's way to the hosts: it joins words with spaces, and a shell on every host reads the line.

It puts a word of the command line in double quotes if that holds a space, the value of a variable if it holds anything
but `A-Za-z0-9_@%+=:,./-`, a folder and the path of Python never. Inside double quotes a shell still runs `$(...)` and
backticks. pdsh replaces `%h`, `%n`, `%u` and `%%` before that. What is accepted here arrives as it was.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.launch.hostfile import lines_of
from pretrain.plain import read_plain
from pretrain.report.findings import Check, fail

# deepspeed exports variables that begin so; those of NCCL only where it sees a GPU when it is started.
PREFIXES, ON_CUDA = ("MLFLOW", "PYTHON", "MV2", "UCX"), "NCCL"
FILE, FILE_VARIABLE = ".deepspeed_env", "DS_ENV_FILE"
LARGEST_FILE = 1 << 20
# Its launcher sets these on the hosts, whatever arrives.
OVERWRITTEN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
# Which of the shell's people would expect to arrive.
EXPECTED = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "TORCH_EXTENSIONS_DIR", "HF_HOME", "HF_HUB_OFFLINE")
EXPECTED_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY($|_)|API_?KEY", re.IGNORECASE)
PDSH_PATH = "DSHPATH"  # becomes PATH on the hosts
BARE_ALONE = "must be of letters, digits and `_@+=:,./-` alone"
SPECIAL = "$`\\"  # of a shell, inside double quotes
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BARE = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_PDSH = re.compile(r"%[hnu%]")


@dataclass(frozen=True)
class Export:
    """A variable that deepspeed sets on every host. source: `this shell`, `deepspeed` or `FILE line N`."""

    name: str
    value: str
    source: str


def exports(
    variables: Mapping[str, str], home: Path, folder: Path, cuda: bool
) -> tuple[dict[str, Export], list[Check]]:
    """What reaches the hosts when deepspeed is started in `folder` with these variables, and what must not.

    cuda: whether it sees a GPU where it is started.
    """
    given = [Export("PYTHONPATH", ":".join([str(folder), *_given(variables, "PYTHONPATH")]), "deepspeed")]
    prefixes = (*PREFIXES, ON_CUDA) if cuda else PREFIXES
    given += [
        Export(name, variables[name].strip(), "this shell")
        for name in sorted(variables)
        if name.startswith(prefixes) and name != "PYTHONPATH"
    ]
    problems: list[Check] = []
    name = variables.get(FILE_VARIABLE, FILE)
    for path in dict.fromkeys((home / name, folder / name)):  # the second one wins
        if path.is_file():
            found, wrong = read_environment(path)
            given, problems = [*given, *found], [*problems, *wrong]
    for one in given:
        if problem := _name_problem(one.name):
            problems.append(fail("environment", f"({one.source}) {problem}"))
        elif problem := _value_problem(one.value):
            problems.append(fail(one.name, f"({one.source}) {problem}"))
    if (given_path := variables.get(PDSH_PATH)) and (not _BARE.fullmatch(given_path) or _PDSH.search(given_path)):
        problems.append(fail(PDSH_PATH, f"{BARE_ALONE}, because pdsh puts it unquoted before the command of the hosts"))
    return {one.name: one for one in given}, problems


def read_environment(path: Path) -> tuple[list[Export], list[Check]]:
    """The lines of a `.deepspeed_env`; deepspeed fails on one without `=`, so blank lines and comments are refused."""
    try:
        text = read_plain(path, LARGEST_FILE).decode()
    except (OSError, UnicodeDecodeError) as error:
        return [], [fail(path.name, f"`{path}` cannot be read: {error}")]
    lines = lines_of(text)
    found, problems = [], []
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        where, (name, equals, value) = f"{path} line {number}", line.partition("=")
        if not line.strip() or line.lstrip().startswith("#"):
            kind = "a comment, which deepspeed takes for one" if line.strip() else "blank, on which deepspeed fails"
            problems.append(fail(path.name, f"`{where}` must be NAME=value, is {kind}"))
        elif not equals:
            problems.append(fail(path.name, f"`{where}` must be NAME=value, has no `=`"))
        elif problem := _name_problem(name.strip()):  # what follows may be a secret
            problems.append(fail(path.name, f"`{where}` {problem}"))
        else:
            found.append(Export(name.strip(), value.strip(), where))
    return found, problems


def warnings(variables: Mapping[str, str], arriving: Mapping[str, Export]) -> Iterator[Check]:
    """What will be otherwise on the hosts than people may think."""
    missing = [
        name
        for name in sorted(variables)
        if (name in EXPECTED or name.startswith(EXPECTED_PREFIXES)) and name not in arriving
    ]
    if missing:
        text = f"set in this shell, {_are(missing)} not exported by deepspeed: put NAME=value lines into {FILE}"
        yield Check("warn", ", ".join(missing), text)
    if vain := [name for name in OVERWRITTEN if name in arriving]:
        yield Check("warn", ", ".join(vain), f"{_are(vain)} set by deepspeed on every host, whatever {FILE} says")
    if told := [name for name in sorted(arriving) if SECRET.search(name)]:
        text = "deepspeed prints what it exports, and every user of the hosts sees it in the list of processes"
        yield Check("warn", ", ".join(told), f"{text}: use a file that only you can read")
    if asked := [name for name in ("PDSH_SSH_ARGS", "PDSH_SSH_ARGS_APPEND") if variables.get(name)]:
        yield Check("warn", ", ".join(asked), "pdsh gives this to ssh, this check does not: use ssh's configuration")


def check_words(python: str, folder: Path, words: Sequence[str]) -> list[Check]:
    """Problems of what deepspeed writes into the remote command line: Python, the folder, words of the command."""
    found = []
    for what, text in (("python", python), ("folder", str(folder))):
        if not _BARE.fullmatch(text) or _PDSH.search(text):
            must = f"{BARE_ALONE}, because deepspeed does not quote it for the hosts"
            found.append(fail(what, f"{must}; it is {text!r:.200}"))
    found += [fail("command", f"{text!r:.200} {problem}") for text in words if (problem := _word_problem(text))]
    return found


def _word_problem(word: str) -> str | None:
    """Why deepspeed cannot bring `word` to a host as it is; it quotes what holds a space, and nothing else."""
    if _PDSH.search(word):
        return "must not hold %h, %n, %u or %%, which pdsh replaces"
    if " " in word:
        return _quoted_problem(word, SPECIAL)  # it escapes double quotes here
    bad = next((character for character in word if not _BARE.fullmatch(character)), None)
    if bad is None:
        return None if word else "must not be empty"
    return f"must not hold {bad!r}, which a shell on the hosts would read: write it into the YAML"


def _value_problem(value: str) -> str | None:
    if found := re.search(r"%[nu%]", value):  # %h means the host to NCCL as well
        return f"must not hold `{found[0]}`, which pdsh replaces"
    return None if not value or _BARE.fullmatch(value) else _quoted_problem(value, SPECIAL + '"')


def _quoted_problem(text: str, special: str) -> str | None:
    """What is wrong with `text` between double quotes."""
    for character in text:
        if character in special:
            return f"must not hold {character!r}, which a shell on the hosts would read"
        if not character.isprintable() and character != "\t":
            return f"must hold printable text alone, not {character!r}"
    return None


def _name_problem(name: str) -> str | None:
    if _NAME.fullmatch(name):
        return None
    return f"must begin with the name of a variable (letters, digits, `_`), {name!r:.60} is none"


def _given(variables: Mapping[str, str], name: str) -> Iterable[str]:
    return [variables[name]] if name in variables else []


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"

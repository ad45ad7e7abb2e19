"""Five hundred ways to damage shards and checkpoints: `verify` finds every one and names the file.

The damage is done in place and undone, the same function that the command line calls looks at it. What is drawn follows
from the number of the case alone, so a case that fails can be run again by itself.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.__main__ import main
from pretrain.report.findings import Finding
from pretrain.report.verify import KINDS, recognise
from tests.pretrain.runs import write_config, write_text

CASES, QUICK = 500, 60
# What people may edit or a running job appends to: no seal, see the docstring of `verify`.
OPEN = {"config.yaml", "env.json", "events.jsonl", "lock", "README.md"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A data folder of two sources, a run of three checkpoints, and its bundle."""
    place = tmp_path_factory.mktemp("whole")
    sources = [f"{name}=text:{write_text(place / f'{name}.txt', count)}" for name, count in (("one", 60), ("two", 40))]
    given = [argument for source in sources for argument in ("--source", source)]
    assert main(["prepare", "--out", str(place / "data"), *given, "--train-tokenizer", "300", "--workers", "1"]) == 0
    config = write_config(place, place / "data")
    assert main(["train", str(config), "train.steps=3", "train.save_every=1", "train.keep=3"]) == 0
    assert main(["handoff", str(place / "runs" / "tiny"), "--out", str(place / "bundle")]) == 0
    return {"data": place / "data", "run": place / "runs" / "tiny", "bundle": place / "bundle"}


def examine(folder: Path) -> list[Finding]:
    return KINDS[recognise(folder)](folder)


def sealed_files(folder: Path) -> list[Path]:
    """The files of shards, checkpoints and bundles; those of boards and samples are nobody's proof."""
    inside = [path for path in folder.rglob("*") if path.is_file() and not {"tb", "samples"} & set(path.parts)]
    return sorted(path for path in inside if path.name not in OPEN)


def flip(path: Path, content: bytearray, draw: random.Random) -> None:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, content: bytearray, draw: random.Random) -> None:
    path.write_bytes(content[: draw.randrange(len(content))])


def grow(path: Path, content: bytearray, draw: random.Random) -> None:
    path.write_bytes(content + draw.randbytes(draw.randint(1, 600)))


def zero(path: Path, content: bytearray, draw: random.Random) -> None:
    """A block that never reached the disk; there is always something in it that is no zero."""
    at = draw.choice([place for place, byte in enumerate(content) if byte])
    length = min(draw.choice((1, 512, 4096)), len(content) - at)
    path.write_bytes(content[:at] + bytes(length) + content[at + length :])


def remove(path: Path, content: bytearray, draw: random.Random) -> None:
    path.unlink()


DAMAGE: tuple[Callable[[Path, bytearray, random.Random], None], ...] = (flip, flip, flip, cut, zero, remove, grow)


def found(path: Path, findings: list[Finding]) -> bool:
    """The pointer alone may be told as a note: a kill leaves it on an older checkpoint, and no start reads it."""
    levels = ("BAD", "note") if path.name == "latest" else ("BAD",)
    return any(finding.level in levels and path.name in finding.text for finding in findings)


def run_case(number: int, folders: dict[str, Path]) -> str | None:
    """Damages one file, or swaps two, and looks; returns what was missed."""
    draw = random.Random(number)
    folder = folders[draw.choice(sorted(folders))]
    path = draw.choice(sealed_files(folder))
    content = path.read_bytes()
    other = draw.choice([one for one in sealed_files(folder) if one.read_bytes() != content])
    kept = other.read_bytes()
    swapped = draw.random() < 0.15
    try:
        if swapped:
            path.write_bytes(kept)
            other.write_bytes(content)
        else:
            damage = draw.choice(DAMAGE)
            damage(path, bytearray(content), draw)
        findings = examine(folder)
        hurt = {path, other} if swapped else {path}
        # Without its manifest nothing in a folder can be told from anything else.
        manifests = {one for one in hurt if one.name == "manifest.json"}
        missed = [one for one in sorted(manifests or hurt) if not found(one, findings)]
    finally:
        path.write_bytes(content)
        other.write_bytes(kept)
    how = f"swapped with {other}" if swapped else damage.__name__
    return f"case {number}: {missed[0]}, {how}, not found in {[one.text for one in findings]}" if missed else None


def run_cases(numbers: range, folders: dict[str, Path]) -> None:
    missed = [problem for number in numbers if (problem := run_case(number, folders))]
    assert not missed, f"{len(missed)} of {len(numbers)} missed: " + "\n".join(missed[:5])
    for name, folder in folders.items():
        assert all(finding.level == "ok" for finding in examine(folder)), name


def test_what_is_whole_is_clean(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (*folders.values(), folders["run"] / "checkpoints" / "step-00000002"):
        assert main(["verify", str(folder)]) == 0
        printed = capsys.readouterr()
        assert "BAD" not in printed.out and "note" not in printed.out and not printed.err


def test_some_damage_is_found(folders: dict[str, Path]) -> None:
    run_cases(range(QUICK), folders)


@pytest.mark.slow
def test_all_damage_is_found(folders: dict[str, Path]) -> None:
    run_cases(range(QUICK, CASES), folders)


@pytest.mark.parametrize("kind", ["data", "run", "bundle"])
def test_every_file_counts(kind: str, folders: dict[str, Path]) -> None:
    """One flipped bit in each: no file is left out of the draw or of the seals."""
    for path in sealed_files(folders[kind]):
        content = path.read_bytes()
        flip(path, bytearray(content), random.Random(path.name))
        assert found(path, examine(folders[kind])), path
        path.write_bytes(content)


def test_a_commit_under_the_name_of_another_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(folders["run"], run)
    one, two = (run / "checkpoints" / f"step-0000000{number}" for number in (1, 2))
    one.rename(tmp_path / "kept")
    two.rename(one)
    (tmp_path / "kept").rename(two)
    bad = [finding.text for finding in examine(run) if finding.level == "BAD"]
    assert len(bad) == 2 and all(
        f"{path.name}/manifest.json is of step" in text for path, text in zip((one, two), bad, strict=True)
    )

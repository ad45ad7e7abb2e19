"""`make bench-gpu` without a GPU: every line of it runs at sizes of a CPU, and what it says is complete."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from parlance_kernels import library

BENCH = Path(__file__).resolve().parents[3] / "kernels" / "bench"


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """`kernels/bench` is no package: its files find each other on the path."""
    path = sys.path[:]
    sys.path.insert(0, str(BENCH))
    import gpu

    yield gpu
    sys.path[:] = path


@pytest.fixture
def harness(gpu: ModuleType) -> ModuleType:
    return sys.modules["gpu_harness"]


def test_every_suite_runs_at_small_sizes(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = sorted((BENCH / "results").iterdir())
    out, folder = tmp_path / "new" / "gpu.json", tmp_path / "profile"
    ended = gpu.main(["--device", "cpu", "--small", "--out", str(out), "--profile", str(folder)])
    told = capsys.readouterr()
    assert ended == 0, told
    suites = json.loads(out.read_text(encoding="utf-8"))["suites"]
    assert list(suites) == list(gpu.SUITES) and "failed" not in told.out, told.err
    names = [row["name"] for suite in suites.values() for row in suite["rows"]]
    skipped = [line for suite in suites.values() for line in suite["not_measured"]]
    numbers = {line.split()[0] for line in names + skipped}
    assert {str(number) for number in range(1, 12)} <= numbers
    assert len(set(names)) == len(names)
    # What a CPU cannot say; anything else must have been measured.
    assert {line.split(":")[0].split(",")[0] for line in skipped} == {
        "3 peak memory of one more sentence",
        "4 library calls merged by log-sum-exp / ours",
        "5 FlexAttention with a fresh BlockMask / ours",
        "7 extra memory",
    }
    targets = {row["name"]: (row["target"], row["sense"]) for suite in suites.values() for row in suite["rows"]}
    assert targets["1 JANUS step / AR step"] == (2.6, "max")
    assert targets["7 torch chain / vocab_loss"] == (3.0, "min")
    assert targets["9 transformers generate, greedy / our NAR pass"] == (50.0, "min")
    assert targets["9 own AR under CUDA graphs / our NAR pass"] == (12.0, "min")
    told_of = (BENCH / "results" / "README.md").read_text(encoding="utf-8")
    for name, (target, sense) in targets.items():
        if target is not None:  # what is judged and was never measured is named
            assert f"| {name} | {'at least' if sense == 'min' else 'at most'} {target:g} |" in told_of, name
    assert suites["attn"]["settings"]["command"].startswith("python kernels/bench/gpu.py --device cpu --small")
    assert all(f"not measured: {line}" in told.out for line in skipped)
    assert sorted(path.name for path in folder.iterdir()) == ["janus_step.json.gz", "janus_step.txt"]
    assert sorted((BENCH / "results").iterdir()) == kept


def test_a_suite_that_fails_costs_only_itself(
    gpu: ModuleType, harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from harness import Row, require

    def rows(name: str) -> Iterator[Row]:
        yield Row(f"{name} first", 2.0, None, "report", "")
        if name == "refused":
            require(False, "sides differ")
        if name == "broken":
            raise RuntimeError("no such kernel")
        if name == "absent":
            raise harness.CannotRun("no card")
        yield Row(f"{name} second", 2.0, 3.0 if name == "slow" else 1.0, "min", "")

    monkeypatch.setattr(gpu, "_rows", lambda name, bench: rows(name))
    out = tmp_path / "gpu.json"

    def run(*names: str) -> int:
        monkeypatch.setattr(gpu, "SUITES", {name: name for name in (*names, "other")})
        return gpu.main(["--device", "cpu", "--small", "--suite", ",".join(names), "--out", str(out)])

    assert run("good") == 0
    assert run("absent", "good") == 0
    assert run("refused", "broken", "good") == 1
    assert run("slow") == 0  # small sizes have no targets
    slow, good = list(rows("slow")), list(rows("good"))
    assert gpu.missed([*good, *slow], small=False) and not gpu.missed(good, small=False)
    suites = json.loads(out.read_text(encoding="utf-8"))["suites"]
    assert {name: len(suite["rows"]) for name, suite in suites.items()} == {
        "good": 2, "absent": 1, "refused": 1, "broken": 1, "slow": 2,
    }  # fmt: skip
    assert suites["refused"]["not_measured"] == [
        "the rest of suite `refused`: failed: SystemExit: benchmark refused: sides differ"
    ]
    assert suites["absent"]["not_measured"] == ["the rest of suite `absent`: CannotRun: no card"]


@pytest.mark.skipif(library.problem() is None, reason="this machine can run the kernels")
def test_without_a_gpu_it_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--suite", "loss"]) == 2
    assert f"bench-gpu cannot run: {library.problem()}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [(["--suite", "loss,what"], "'what' must be one of attn, loss"), (["--device", "cpu"], "goes with `--small`")],
)
def test_what_cannot_be_is_told(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str], given: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(given)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_side_that_is_less_exact_is_refused(harness: ModuleType) -> None:
    exact = [torch.ones(4, dtype=torch.float64), torch.arange(4.0)]
    near, far = [[x * (1 + off) for x in exact] for off in (0.01, 0.05)]
    assert harness.as_good("a", near, near, exact, floor=0) == "error 1.0e-02, the other side's 1.0e-02"
    with pytest.raises(SystemExit, match=r"a must be as exact as the other side: 5\.0e-02 and 1\.0e-02"):
        harness.as_good("a", far, near, exact, floor=0)
    with pytest.raises(SystemExit):
        harness.as_good("a", [near[0], near[1] * torch.nan], near, exact)


def test_ratios_are_of_medians(harness: ModuleType) -> None:
    times = harness.Times([6.0, 2.0], 50)
    assert times.ratio("x", 0, 1, 3.0, True, "").ok and not times.ratio("x", 0, 1, 2.9, False, "").ok
    row = times.ratio("x", 0, 1, None, True, "more", factor=0.5)
    assert (row.ratio, row.sense) == (1.5, "report")
    assert row.detail == "6.000 ms over 2.000 ms, medians of 50; more"


def test_a_name_becomes_a_file(gpu: ModuleType) -> None:
    class Cuda:
        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def get_device_name() -> str:
            return "NVIDIA H200 (SXM)"

    assert gpu.slug(Cuda) == "nvidia-h200-sxm"

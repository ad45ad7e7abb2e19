"""`make bench-gpu`: the figures of a GPU, each after its equality check, both sides of every ratio in this process.

    python kernels/bench/gpu.py --suite attn,loss,exit,step,loader,latency,exit_latency
    python kernels/bench/gpu.py --device cpu --small        every line of it at sizes a CPU can run; no figure is kept

A row or a suite that cannot run here is named, with the reason, and left out. Results go to
kernels/bench/results/<device>-<date>.json; a suite that runs again on the same day replaces its rows.
"""

import argparse
import json
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH), str(BENCH.parent), str(BENCH.parent.parent)]

import torch  # noqa: E402
from gpu_harness import Bench, CannotRun  # noqa: E402
from harness import Row  # noqa: E402

from parlance_kernels import available_backends, library  # noqa: E402

# Where each suite is; imported when it runs, so that a library that is missing costs its suite alone.
SUITES = {
    "attn": "gpu_attention.rows",
    "loss": "gpu_loss.rows",
    "exit": "gpu_exits.rows",
    "step": "gpu_steps.rows",
    "loader": "gpu_steps.loader_rows",
    "latency": "gpu_latency.rows",
    "exit_latency": "gpu_exit_latency.rows",
}


def main(argv: list[str] | None = None) -> int:
    """Runs suites, prints rows, writes the JSON; 1 if a target is missed or a check refuses, 2 without a GPU."""
    given = _parse(argv)
    device = torch.device(given.device)
    if device.type == "cuda" and "cuda" not in available_backends():
        print(f"bench-gpu cannot run: {library.problem()}", file=sys.stderr)
        return 2
    bench = Bench(device, given.small, profile=given.profile)
    settings = describe(bench, argv)
    print(", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    done: list[Row] = []
    failed = False
    for name in given.suite:
        started, first, skipped = time.perf_counter(), len(done), len(bench.skipped)
        try:
            for row in _rows(SUITES[name], bench):
                done.append(row)
                show(row, judged=not given.small)
        except (CannotRun, ImportError, NotImplementedError, torch.OutOfMemoryError) as why:
            bench.skip(f"the rest of suite `{name}`", f"{type(why).__name__}: {why}")
        except (Exception, SystemExit) as why:  # one suite must not cost the others their figures
            failed = True
            traceback.print_exc()
            bench.skip(f"the rest of suite `{name}`", f"failed: {type(why).__name__}: {why}")
        if bench.cuda:
            torch.cuda.empty_cache()
        print(f"suite {name}: {time.perf_counter() - started:.0f} s", flush=True)
        if given.out is not None:
            made = {"settings": settings, "rows": [row.as_json() for row in done[first:]]}
            _write(given.out, name, {**made, "not_measured": bench.skipped[skipped:]})
    for line in bench.skipped:
        print(f"not measured: {line}", flush=True)
    return 1 if failed or missed(done, given.small) else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Parlance's figures on this GPU")
    parser.add_argument("--suite", default=",".join(SUITES), help=f"of {', '.join(SUITES)}; several with commas")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny sizes, once each: finds mistakes, measures nothing")
    parser.add_argument("--out", type=Path, help="default kernels/bench/results/<device>-<date>.json, on a GPU")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="table of kernels and trace of a JANUS step")
    given = parser.parse_args(argv)
    given.suite = given.suite.split(",")
    for name in given.suite:
        if name not in SUITES:
            parser.error(f"`--suite` {name!r} must be one of {', '.join(SUITES)}")
    if given.device == "cpu" and not given.small:
        parser.error("`--device cpu` goes with `--small`; a CPU's figures are `make bench`'s")
    if given.out is None and given.device == "cuda" and not given.small:
        given.out = BENCH / "results" / f"{slug(torch.cuda)}-{date.today().isoformat()}.json"
    return given


def slug(cuda: Any) -> str:
    """The device's name for a file."""
    name = cuda.get_device_name() if cuda.is_available() else "no-gpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(bench: Bench, argv: list[str] | None) -> dict[str, str]:
    """What somebody needs who wants to see the same figures; with the machine's own speed first."""
    given = sys.argv[1:] if argv is None else argv
    told = {
        "command": shlex.join(["python", "kernels/bench/gpu.py", *given]),
        "device": torch.cuda.get_device_name() if bench.cuda else "cpu",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "date": date.today().isoformat(),
    }
    size, bytes_ = (64, 1 << 12) if bench.small else (8192, 1 << 31)
    one = torch.ones(size, size, dtype=bench.dtype, device=bench.device)
    block = torch.zeros(bytes_, dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(block)
    product, copy = bench.times([lambda: one @ one, lambda: other.copy_(block)], repeats=20).milliseconds
    if bench.cuda and not bench.small:
        told["bf16_product_tflops"] = f"{2e-9 * size**3 / product:.0f}"
        told["copy_gb_a_second"] = f"{2e-6 * bytes_ / copy:.0f}"
    return told


def _rows(where: str, bench: Bench) -> Iterator[Row]:
    module, function = where.split(".")
    rows: Callable[[Bench], Iterator[Row]] = getattr(import_module(module), function)
    return rows(bench)


def missed(rows: Iterable[Row], small: bool) -> bool:
    """Whether a target is missed; small sizes have none."""
    return not small and not all(row.ok for row in rows)


def show(row: Row, judged: bool) -> None:
    """One line: name, ratio, target, verdict."""
    sign = {"max": "<=", "min": ">=", "report": ""}[row.sense]
    target = "-" if row.target is None else f"{sign} {row.target:,.2f}"
    verdict = "" if not judged else "yes" if row.ok else "NO"
    print(f"{row.name:62}{row.ratio:>10,.3f}{target:>10}   {verdict:4} {row.detail}", flush=True)


def _write(out: Path, name: str, suite: dict[str, object]) -> None:
    suites = json.loads(out.read_text(encoding="utf-8"))["suites"] if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"suites": {**suites, name: suite}}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())

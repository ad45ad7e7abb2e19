"""`make bench`: every figure of this machine's CPU, each after its equality check, as a table and as JSON.

python kernels/bench/run.py [SUITE ...] [--out FILE]      with suites named, FILE keeps its rows of the others
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH), str(BENCH.parent.parent)]

import attention  # noqa: E402
import data  # noqa: E402
import exit_latency  # noqa: E402
import exits  # noqa: E402
import latency  # noqa: E402
import masks  # noqa: E402
import saving  # noqa: E402
import steps  # noqa: E402
import torch  # noqa: E402
import vocab  # noqa: E402
from harness import Row  # noqa: E402

SUITES: dict[str, Callable[[], list[Row]]] = {
    "masks": masks.rows,
    "segments": attention.rows,
    "janus": steps.janus_rows,
    "padded": lambda: [steps.padded_row()],
    "vocab": vocab.rows,
    "lplm": exits.rows,
    "data": data.rows,
    "nar_latency": lambda: [latency.nar_row()],
    "ar_latency": lambda: [latency.ar_row()],
    "ct2_latency": latency.ct2_rows,
    "exit_latency": exit_latency.rows,
    "saving": lambda: [saving.row()],
}


def main() -> int:
    """Runs the suites asked for (default all), prints the table, writes the JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Parlance's figures on this CPU")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default all")
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "cpu.json")
    given = parser.parse_args()
    for name in given.suites:
        if name not in SUITES:
            parser.error(f"suite `{name}` must be one of {', '.join(SUITES)}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    print(f"{'name':24}{'ratio':>10}{'target':>12}   ok", flush=True)
    done: list[Row] = []
    for name in given.suites or SUITES:
        for row in SUITES[name]():
            done.append(row)
            sign = {"max": "<=", "min": ">=", "report": ""}[row.sense]
            target = "-" if row.target is None else f"{sign} {row.target:,.2f}"
            verdict = "yes" if row.ok else "NO"
            print(f"{row.name:24}{row.ratio:>10,.2f}{target:>12}   {verdict:4} {row.detail}", flush=True)
    rows = [row.as_json() for row in done]
    if given.suites and given.out.exists():  # the others keep their figures
        former = json.loads(given.out.read_text(encoding="utf-8"))
        renewed = {row["name"]: row for row in rows}
        rows = [renewed.pop(row["name"], row) for row in former] + list(renewed.values())
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row.ok for row in done) else 1


if __name__ == "__main__":
    raise SystemExit(main())

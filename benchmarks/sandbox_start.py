"""What it costs to start the sandbox: a batch of tests against a bare interpreter.

    python benchmarks/sandbox_start.py [--rounds N] [--quick] [--json]

Each round starts, in turn, a bare interpreter that ends at once (``python -I -S -c pass``), the sandbox with one test
of a trivial program, and the sandbox with 16. Medians of wall-clock time over the rounds; a start is the batch of one.
The last line is one JSON object; a run without --quick also writes benchmarks/results/sandbox_start.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.serve_load import circumstances
from openzaya.sandbox import Test, isolation, run_python

RESULTS = Path(__file__).parent / "results"
MANY = 16


def bare() -> None:
    """An interpreter of the same kind, without anything around it."""
    subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)


def sandboxed(num_tests: int) -> None:
    """A batch whose every test passes."""
    results = run_python("print(int(input()) + 1)", [Test(stdin=str(number)) for number in range(num_tests)])
    found = [result.stdout.strip() for result in results]
    if found != [str(number + 1) for number in range(num_tests)]:
        raise SystemExit(f"the sandbox answered {found}; run openzaya doctor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="3 rounds; writes no file")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    if rounds < 1:
        parser.error(f"--rounds {rounds}: give 1 or more")
    kinds = {"bare interpreter": bare, "one test": lambda: sandboxed(1), f"{MANY} tests": lambda: sandboxed(MANY)}
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, run in kinds.items():
            begun_s = time.perf_counter()
            run()
            taken[name].append(1000 * (time.perf_counter() - begun_s))
    # The first round finds nothing in the page cache, and looks for an isolation that holds.
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    worst = {name: max(times[1:]) for name, times in taken.items()}
    record = circumstances() | {
        "isolation": isolation().method,
        "rounds": rounds,
        "median_ms": medians,
        "worst_ms": worst,
    }
    if not arguments.json:
        print(f"isolation: {record['isolation']}")
        for name, median in medians.items():
            ratio = median / medians["bare interpreter"]
            print(f"    {name:18}{median:8.1f} ms   {ratio:5.1f} bare interpreters   worst {worst[name]:.1f} ms")
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "sandbox_start.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()

"""Runs the hostile programs from a copy of the sandbox, as whatever user it is started as; prints the results as JSON.

Arguments: the hostile programs' file, a JSON object of names the programs may use, and a method or "" for the best.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor

from openzaya.sandbox import Limits, Result, Test, isolation
from openzaya.sandbox.run import run_batch

LIMITS = {"cpu_s": 0.4, "wall_s": 4.0, "output_bytes": 4096}
SLEEPERS = ("sleeping", "stopped", "waiting for input for ever")


def main() -> None:
    programs = runpy.run_path(sys.argv[1])
    names = "".join(f"{name} = {value!r}\n" for name, value in json.loads(sys.argv[2]).items())
    method = sys.argv[3] or isolation().method
    # Forking has to be refused by the limit too, and not only where it is forbidden altogether.
    several = method != "landlock"

    def run(name: str) -> list[Result]:
        forks = several and any(word in programs["PROGRAMS"][name][1] for word in ("fork", "mmap", "kill(-1"))
        limits = Limits(**LIMITS, num_processes=16 if forks else 1)
        if name in SLEEPERS:
            limits = Limits(**{**LIMITS, "wall_s": 1.0})
        source = names + programs["PRELUDE"] + programs["PROGRAMS"][name][1]
        tests = [Test()] if name in SLEEPERS or "flood by mmap" in name else [Test(), Test(stdin="later")]
        return run_batch(method, source, tests, limits)

    with ThreadPoolExecutor(3) as pool:
        done = dict(zip(programs["PROGRAMS"], pool.map(run, programs["PROGRAMS"]), strict=True))
    plain = {name: [result.__dict__ for result in results] for name, results in done.items()}
    print(json.dumps({"method": method, "user": os.geteuid(), "results": plain}))


if __name__ == "__main__":
    main()

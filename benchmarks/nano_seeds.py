"""The nano cascade over several seeds: every stage's accuracy as mean and range, and the baseline beside it.

    python benchmarks/nano_seeds.py [--seeds 0 1 2] [--runs runs] [--run] [--quick]

With --run (``make nano-seeds``) recipes/nano and then recipes/nano-clean are run for each seed in RUNS/nano-seed-N;
what is finished is not run again. Without it, the table is made of the runs that are there. Seed N is every seed of a
stage that trains plus 1000 N: weights, data and their order, prompts. The tokenizer and the held-out problems are the
same for all seeds.

A number is the mean over seeds, with the lowest and the highest in brackets; a range of three is no interval. The last
line is one JSON object; with --run it is written to benchmarks/results/nano_seeds.json too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serve_load import circumstances  # noqa: E402
from openzaya.config import load_recipe  # noqa: E402
from openzaya.stages import STAGE_FILE, stage_kind, stage_schema  # noqa: E402

RESULTS = Path(__file__).parent / "results"
RECIPES = (ROOT / "recipes" / "nano", ROOT / "recipes" / "nano-clean")
TRAINING = ("train", "reward_model", "rl")
COLUMNS = {
    "avg": "avg_at_k",
    "greedy": "greedy",
    "majority": "majority_at_k",
    "pass": "pass_at_k",
    "instructions": "instructions",
    "length": "length_right_tokens",
}
"""Column -> key of a row of ``cascade.json``. Percent, but for the length of right answers in tokens."""
RSA_COLUMNS = {"avg": "avg", "majority": "majority", "pass": "pass"}


def seed_overrides(recipes: Path, seed: int) -> list[str]:
    """``STAGE.key=value`` for every seed of every stage of ``recipes`` that trains."""
    found = []
    for path in sorted(path for path in recipes.glob("*.toml") if STAGE_FILE.match(path.name)):
        if stage_kind(path) in TRAINING:
            values = load_recipe(path, stage_schema(path)).value.model_dump(mode="json")
            found += [f"{path.stem}.{key}={value + 1000 * seed}" for key, value in _seeds(values)]
    return found


def _seeds(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        here = (*path, str(key))
        if key == "seed" and isinstance(entry, int):
            yield ".".join(here), entry
        else:
            yield from _seeds(entry, here)


def run(out: Path, seed: int) -> None:
    """Both pipelines; ends the script where one fails."""
    for recipes in RECIPES:
        command = [sys.executable, "-m", "openzaya.cli", "run", str(recipes), "--out", str(out)]
        outcome = subprocess.run([*command, *seed_overrides(recipes, seed)], cwd=ROOT)
        if outcome.returncode:
            raise SystemExit(outcome.returncode)


def read_rows(directory: Path) -> dict[str, dict[str, float]]:
    """Row -> column -> number, from every ``cascade.json`` of a run; the first of a row's name counts."""
    rows: dict[str, dict[str, float]] = {}
    for path in sorted(directory.glob("*/cascade.json")):
        cascade = json.loads(path.read_text(encoding="utf-8"))
        for row in cascade["rows"]:
            instructions = row.get("instructions") or {}
            values = row | {"instructions": instructions.get("strict")}
            rows.setdefault(row["label"], _means(values, COLUMNS))
        if cascade.get("rsa"):
            rows.setdefault(cascade["rsa"]["label"], _means(cascade["rsa"], RSA_COLUMNS))
    return rows


def _means(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, float]:
    found = {column: values.get(key) for column, key in columns.items()}
    return {
        column: interval[0] * (1 if column == "length" else 100)
        for column, interval in found.items()
        if interval is not None
    }


def over_seeds(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Row -> column -> [mean, lowest, highest, seeds that have it], in the order of the first run that has the row."""
    labels = list(dict.fromkeys(label for rows in runs for label in rows))
    summary: dict[str, dict[str, list[float]]] = {}
    for label in labels:
        summary[label] = {}
        for column in COLUMNS:
            values = [rows[label][column] for rows in runs if column in rows.get(label, {})]
            if values:
                summary[label][column] = [sum(values) / len(values), min(values), max(values), len(values)]
    return summary


def table(summary: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The summary as a Markdown table."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label, columns in summary.items():
        cells = [_cell(columns[column]) if column in columns else "" for column in COLUMNS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(numbers: Sequence[float]) -> str:
    mean, low, high, _ = numbers
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--run", action="store_true", help="run what is missing; an hour or two a seed on two cores")
    parser.add_argument("--quick", action="store_true", help="only read what is there, and be content with nothing")
    options = parser.parse_args()
    if any(seed < 0 for seed in options.seeds) or len(set(options.seeds)) < len(options.seeds):
        parser.error(f"seeds {options.seeds}: give different numbers, 0 or more")
    directories = {seed: options.runs / f"nano-seed-{seed}" for seed in options.seeds}
    if options.run and not options.quick:
        for seed, directory in directories.items():
            run(directory, seed)
    by_seed = {seed: rows for seed, directory in directories.items() if (rows := read_rows(directory))}
    if not by_seed and not options.quick:
        parser.error(f"no cascade.json in {', '.join(map(str, directories.values()))}; run them with --run")
    summary = over_seeds(list(by_seed.values()))
    print(f"seeds: {', '.join(map(str, by_seed)) or 'none'}; mean [lowest, highest] over seeds\n")
    print(table(summary))
    record = circumstances() | {"seeds": list(by_seed), "summary": summary, "by_seed": by_seed}
    if options.run and not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "nano_seeds.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()

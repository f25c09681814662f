"""What Markovian RSA gains over single rollouts, majority voting, and aggregators that see nothing useful.

    python benchmarks/rsa_gain.py --model runs/nano/04-sft/model [--problems N] [--seed N] [--sweep N] [--out FILE]

Problems of the held-out split on which single rollouts score 30 to 70 %: which those are is decided by 16 samples that
are used for nothing else, so a problem's luck there does not count. Compared on them, all at temperature 1, top-p 1:

    single     mean of parallel samples (t = 0)
    majority   the most frequent answer of as many of these samples as generate at least RSA's tokens
    rsa        mean over the final round
    empty      the same run with empty tails: an aggregator that ignores its candidates would do as well
    others     the same run with tails of other problems

Differences are paired by problem, with 95 % bootstrap intervals over problems. ``--sweep`` varies n, c, t, beta and tau
one at a time on so many of the problems, and plots accuracy against generated tokens with the special cases as points.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from openzaya.infer.engine import Engine
from openzaya.initialize import initialize_checkpoint
from openzaya.intervals import mean_with_interval
from openzaya.problems import TRAINED_FAMILIES, Problem, get_family, make_problem
from openzaya.runlog import describe_environment, format_duration
from openzaya.ttc.answers import majority
from openzaya.ttc.completer import Rollout, Tail
from openzaya.ttc.config import RSAConfig
from openzaya.ttc.engine_completer import EngineCompleter
from openzaya.ttc.results import RSAResult
from openzaya.ttc.rsa import markovian_rsa

BAND = (0.3, 0.7)
NUM_CALIBRATION = 16
FOREIGN_TAILS = 64
"""A problem; its rollouts draw from them."""
NUM_PARALLEL = 56
"""Samples a problem for ``single`` and ``majority``: more than RSA's tokens buy."""
BASE = RSAConfig(
    n=16, c=4, t=2, beta=128, tau=64, final_budget=160, answer_budget=32, prompt_style="short", select="all"
)
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "n": [{"n": 4}, {"n": 8}, {"n": 32}],
    "c": [{"c": 1}, {"c": 2}, {"c": 3}, {"c": 6}],
    "t": [{"t": 0}, {"t": 1}, {"t": 4}],
    "beta": [{"beta": 24}, {"beta": 48}],
    "tau": [{"tau": 8}, {"tau": 24}, {"tau": 40}],
    "special cases": [
        {"c": 1, "continuation": "prefill", "beta": 48},
        {"compaction": "full"},
        {"carry": "answer"},
        {"carry": "answer_or_reasoning"},
    ],
}
SPECIAL_NAMES = ("Delethink", "full-chain RSA", "PaCoRe", "hybrid")


class OtherTails(EngineCompleter):
    """Hands on tails of other problems, drawn from a pool to which its own problem gave nothing."""

    def __init__(self, engine: Engine, pool: Sequence[Tail], seed: int) -> None:
        super().__init__(engine)
        self._pool, self._seed = pool, seed

    async def tails(self, texts: Sequence[str], tau: int) -> list[Tail]:
        # By the text itself: rollouts end in no fixed order.
        return [random.Random(f"{self._seed} {text}").choice(self._pool) for text in texts]


@dataclass(frozen=True)
class Shard:
    """What one process is given to do."""

    problems: list[Problem]
    config: RSAConfig
    pools: list[list[Tail]] | None
    """Foreign tails for each problem, for the control."""


_engine: Engine | None = None


def _start(model: str) -> None:
    """In each process: an engine of its own, with one thread."""
    global _engine
    _engine = Engine(model, max_running=384, max_waiting=1_000_000)


def _run(shard: Shard) -> list[RSAResult]:
    return asyncio.run(_run_all(shard))


async def _run_all(shard: Shard) -> list[RSAResult]:
    assert _engine is not None
    engine, together = _engine, asyncio.Semaphore(48)

    async def one(index: int, problem: Problem) -> RSAResult:
        completer = EngineCompleter(engine)
        if shard.pools is not None:
            completer = OtherTails(engine, shard.pools[index], shard.config.seed + index)
        async with together:
            return await markovian_rsa(
                problem.prompt, completer, shard.config, verifier=lambda rollout: reward(problem, rollout)
            )

    return list(await asyncio.gather(*(one(index, problem) for index, problem in enumerate(shard.problems))))


class Bench:
    """Runs settings on problems, in several processes: what is not arithmetic is Python, one core a process."""

    def __init__(self, model: str, seed: int, num_processes: int) -> None:
        self.seed = seed
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(num_processes, context, initializer=_start, initargs=(model,))

    def run(
        self, name: str, problems: Sequence[Problem], config: RSAConfig, pools: list[list[Tail]] | None = None
    ) -> list[RSAResult]:
        """One result a problem."""
        config = config.model_copy(update={"seed": self.seed})
        results: list[RSAResult | None] = [None] * len(problems)
        size = max(1, min(32, len(problems) // 4))
        begun: dict[Future[list[RSAResult]], int] = {}
        for start in range(0, len(problems), size):
            part = None if pools is None else pools[start : start + size]
            shard = Shard(list(problems[start : start + size]), config, part)
            begun[self.pool.submit(_run, shard)] = start
        began, done, num_tokens = time.perf_counter(), 0, 0
        for future in as_completed(begun):
            found = future.result()
            results[begun[future] : begun[future] + len(found)] = found
            done += len(found)
            num_tokens += sum(result.usage.completion for result in found)
            seconds = time.perf_counter() - began
            left = format_duration(seconds / done * (len(problems) - done))
            say(f"{name}: {done}/{len(problems)} problems, {num_tokens / seconds:,.0f} tokens/s, {left} left")
        whole = [result for result in results if result is not None]
        say(f"{name}: mean {np.mean([score(result) for result in whole]):.3f}")
        return whole


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def reward(problem: Problem, rollout: Rollout) -> float | None:
    """The family's verdict; a rollout that never closed its reasoning is wrong."""
    text = (
        f"<think>{rollout.reasoning}</think>{rollout.content}" if rollout.is_closed else f"<think>{rollout.reasoning}"
    )
    return get_family(problem.family).verify(problem, text).reward


def choose_problems(
    bench: Bench, wanted: int, seed: int, band: tuple[float, float], per_cell: int = 6
) -> tuple[list[Problem], int]:
    """So many problems whose single rollouts score inside the band, and how many were asked for it.

    ``per_cell`` problems of each family and difficulty are asked at a time.
    """
    parallel = BASE.model_copy(update={"t": 0, "n": NUM_CALIBRATION})
    kept: list[Problem] = []
    seen: set[str] = set()
    for batch in range(40):
        problems = []
        for family in TRAINED_FAMILIES:
            for difficulty in range(2, 8):
                for index in range(batch * per_cell, (batch + 1) * per_cell):
                    problem = make_problem(family, difficulty, seed, index, "heldout")
                    if problem.canonical not in seen:
                        seen.add(problem.canonical)
                        problems.append(problem)
        results = bench.run(f"calibration {batch}", problems, parallel)
        kept += [p for p, r in zip(problems, results, strict=True) if band[0] <= (r.score or 0.0) <= band[1]]
        if len(kept) >= wanted:
            break
    # Families one after another would make the sweep's first problems all alike.
    random.Random(seed).shuffle(kept)
    return kept[:wanted], len(seen)


def score(result: RSAResult, round_index: int = -1) -> float:
    rewards = [c.correct or 0.0 for c in result.rounds[round_index].candidates]
    return sum(rewards) / len(rewards)


def vote(parallel: RSAResult, num_tokens: int) -> tuple[float, int]:
    """Reward of the most frequent answer of the first samples that have at least so many tokens, and their number."""
    candidates, total = [], 0
    for candidate in parallel.rounds[0].done:
        if total >= num_tokens:
            break
        assert candidate.rollout is not None
        candidates.append(candidate)
        total += candidate.rollout.usage.completion
    chosen = majority([candidate.answer for candidate in candidates])
    return (candidates[chosen].correct or 0.0) if chosen is not None else 0.0, len(candidates)


def truncation(results: Sequence[RSAResult]) -> float:
    final = [candidate.rollout for result in results for candidate in result.rounds[-1].done]
    return float(np.mean([rollout is not None and rollout.finish_reason == "length" for rollout in final]))


def compare(bench: Bench, problems: list[Problem]) -> tuple[dict[str, Any], list[RSAResult]]:
    """The five means, their paired differences, and the same by family."""
    rsa = bench.run("rsa", problems, BASE)
    parallel = bench.run("parallel", problems, BASE.model_copy(update={"t": 0, "n": NUM_PARALLEL}))
    empty = bench.run("empty tails", problems, BASE.model_copy(update={"tau": 0}))
    tails = [[c.tail for one in result.rounds[:-1] for c in one.done if c.tail is not None] for result in rsa]
    draw, pools = random.Random(bench.seed), []
    for index in range(len(problems)):
        others = [tail for other, mine in enumerate(tails) if other != index for tail in mine]
        pools.append(draw.sample(others, min(FOREIGN_TAILS, len(others))))
    foreign = bench.run("tails of other problems", problems, BASE, pools)
    votes = [vote(p, r.usage.completion) for p, r in zip(parallel, rsa, strict=True)]
    means = {
        "single": np.array([score(result) for result in parallel]),
        "majority": np.array([reward for reward, _ in votes]),
        **{f"rsa round {k}": np.array([score(result, k) for result in rsa]) for k in range(BASE.t)},
        "rsa": np.array([score(result) for result in rsa]),
        "empty": np.array([score(result) for result in empty]),
        "others": np.array([score(result) for result in foreign]),
    }
    families = {}
    for family in TRAINED_FAMILIES:
        of = np.array([problem.family == family for problem in problems])
        if of.any():
            families[family] = {"n": int(of.sum())} | {name: float(v[of].mean()) for name, v in means.items()}
    record = {
        "n": len(problems),
        "means": {name: mean_with_interval(values) for name, values in means.items()},
        "rsa_minus": {
            name: mean_with_interval(means["rsa"] - means[name]) for name in ("single", "majority", "empty", "others")
        },
        "families": families,
        "per_problem": {name: [round(float(value), 4) for value in values] for name, values in means.items()},
        "votes": float(np.mean([count for _, count in votes])),
        "tokens_per_problem": {
            name: float(np.mean([result.usage.completion for result in results]))
            for name, results in (("rsa", rsa), ("empty", empty), ("others", foreign))
        },
        "truncation": {
            name: truncation(results)
            for name, results in (("single", parallel), ("rsa", rsa), ("empty", empty), ("others", foreign))
        },
    }
    return record, parallel


def sweep(bench: Bench, problems: list[Problem], parallel: list[RSAResult]) -> dict[str, list[dict[str, Any]]]:
    """Accuracy against generated tokens, one setting at a time; majority voting beside it."""

    def point(label: str, results: Sequence[RSAResult]) -> dict[str, Any]:
        tokens = float(np.mean([result.usage.completion for result in results]))
        accuracy = mean_with_interval([score(result) for result in results])
        return {"label": label, "tokens": tokens, "accuracy": accuracy, "truncation": truncation(results)}

    base = point("default", bench.run("sweep default", problems, BASE))
    curves: dict[str, list[dict[str, Any]]] = {"default": [base]}
    for name, changes in SWEEPS.items():
        curves[name] = []
        for number, change in enumerate(changes):
            label = ", ".join(f"{key}={value}" for key, value in change.items())
            results = bench.run(f"sweep {label}", problems, RSAConfig.model_validate(BASE.model_dump() | change))
            curves[name].append(point(SPECIAL_NAMES[number] if name == "special cases" else label, results))
    curves["majority"] = []
    for num_samples in (1, 2, 4, 8, 16, 32, 48, NUM_PARALLEL):
        tokens = [
            sum(c.rollout.usage.completion for c in p.rounds[0].done[:num_samples] if c.rollout) for p in parallel
        ]
        rewards = [vote(p, count)[0] for p, count in zip(parallel, tokens, strict=True)]
        curves["majority"].append(
            {"label": f"{num_samples}", "tokens": float(np.mean(tokens)), "accuracy": mean_with_interval(rewards)}
        )
    return curves


def plot(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One line a setting, through the default; special cases as points."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    [base] = curves["default"]
    for name, points in curves.items():
        if name == "default":
            continue
        if name == "special cases":
            for one, marker in zip(points, "Ps^X", strict=True):
                axes.plot(one["tokens"], one["accuracy"][0], marker, color="black", markersize=9, label=one["label"])
            continue
        shown = sorted(points if name == "majority" else [*points, base], key=lambda one: one["tokens"])
        style = {"color": "gray", "linestyle": "--"} if name == "majority" else {}
        label = "majority of parallel samples" if name == "majority" else f"RSA, {name} varied"
        error = [[abs(one["accuracy"][0] - one["accuracy"][side]) for one in shown] for side in (1, 2)]
        x, y = [one["tokens"] for one in shown], [one["accuracy"][0] for one in shown]
        axes.errorbar(x, y, yerr=error, marker="o", markersize=4, capsize=2, label=label, **style)
        if name != "majority":
            for one in points:
                at = (one["tokens"], one["accuracy"][0])
                axes.annotate(one["label"], at, fontsize=7, xytext=(3, 4), textcoords="offset points")
    axes.plot(base["tokens"], base["accuracy"][0], "*", color="black", markersize=14, label="default")
    axes.set_xscale("log")
    axes.set_xlabel("generated tokens a problem")
    axes.set_ylabel("mean accuracy of the final round")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model that knows aggregation prompts, such as runs/nano/04-sft/model")
    parser.add_argument("--problems", type=int, default=504)
    parser.add_argument("--sweep", type=int, default=0, help="problems of the sweep; 0: none")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2, help="one core each")
    parser.add_argument("--out", type=Path, help="write the record here; the plot beside it")
    parser.add_argument("--quick", action="store_true", help="an untrained model and few problems: does it run?")
    options = parser.parse_args()
    if not options.model and not options.quick:
        parser.error("--model is missing; train one with: make nano")
    with contextlib.ExitStack() as stack:
        band = BAND
        if options.quick:
            import tempfile

            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            initialize_checkpoint("nano", directory / "model", seed=0)
            options.model, options.problems, options.sweep, band = directory / "model", 4, 0, (0.0, 1.0)
        os.environ["OMP_NUM_THREADS"] = "1"
        bench = Bench(str(options.model), options.seed, options.processes)
        stack.enter_context(bench.pool)
        began = time.perf_counter()
        num_asked_together = 1 if options.quick else 6
        problems, num_asked = choose_problems(bench, options.problems, options.seed, band, num_asked_together)
        compared, parallel = compare(bench, problems)
        record = {
            "benchmark": "rsa_gain",
            "date": datetime.date.today().isoformat(),
            "environment": describe_environment(),
            "model": "untrained" if options.quick else str(options.model),
            "seed": options.seed,
            "settings": BASE.model_dump(mode="json"),
            "problems_asked": num_asked,
            "band": band,
            "comparison": compared,
            "seconds": round(time.perf_counter() - began),
        }
        for name, (mean, low, high) in compared["means"].items():
            say(f"{name:<14} {mean:6.1%} [{low:5.1%}, {high:5.1%}]")
        for name, (mean, low, high) in compared["rsa_minus"].items():
            say(f"rsa - {name:<10} {100 * mean:+6.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")
        # Before the sweep, which takes as long again.
        write(record, options.out)
        if options.sweep:
            curves = sweep(bench, problems[: options.sweep], parallel[: options.sweep])
            record |= {"sweep": curves, "sweep_problems": options.sweep}
            record["seconds"] = round(time.perf_counter() - began)
            write(record, options.out)
            if options.out:
                plot(curves, options.out)
    print(json.dumps(record))


def write(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

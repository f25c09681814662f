"""What quantisation costs in right answers: held-out problems, one bfloat16 model and quantised forms of it.

    python benchmarks/quantised_accuracy.py --model DIR [--schemes TEXT...] [--seed N] [--per-cell N] [--k N] [--json]

Every form answers the same problems through the engine: once greedily and k times at T = 1 (top-p 1) from the same
seeds. The reference is the model in bfloat16, the type of the released weights; quantised forms are made from these
bfloat16 weights. Differences are paired by problem, with 95 % bootstrap intervals over problems (k samples of a problem
are not k independent observations). ``truncated`` is the share of answers that reached the token limit.

The last line is one JSON object; ``--out FILE`` writes it to a file as well.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from openzaya.data.chat import render
from openzaya.data.tokenizer import load_tokenizer
from openzaya.eval.benchmarks import Answered, EvalConfig, draw_problems, judge
from openzaya.infer.cpu_runner import CpuRunner
from openzaya.infer.generate import Completion, generate
from openzaya.infer.sampling import SamplingParams
from openzaya.initialize import initialize_checkpoint
from openzaya.intervals import mean_with_interval
from openzaya.model import hf
from openzaya.model.quantised import QuantScheme, quantise_model
from openzaya.model.transformer import Zaya
from openzaya.runlog import describe_environment

SCHEMES = ("int8", "int4", "int4,attention=int4,head=int4")


def answer(model: Zaya, tokenizer: Any, config: EvalConfig) -> list[Answered]:
    """All problems answered greedily and ``config.k`` times."""
    problems = draw_problems(config)
    prompts = [
        render([{"role": "user", "content": problem.prompt}], tokenizer, add_generation_prompt=True).tokens
        for problem in problems
    ]

    def ask(temperature: float, num_samples: int) -> list[list[Completion]]:
        params = SamplingParams(
            temperature=temperature, top_p=1, max_new_tokens=config.max_new_tokens, seed=config.seed
        )
        return generate(model, prompts, params, num_samples=num_samples, max_rows=config.max_rows)

    greedy, sampled = ask(0, 1), ask(1, config.k)
    return [judge(problem, greedy[i][0], sampled[i], tokenizer) for i, problem in enumerate(problems)]


def rewards(answered: list[Answered]) -> dict[str, np.ndarray]:
    """One number a problem, in [0, 1]; a missing verdict counts as wrong, for every form alike."""
    return {
        "greedy": np.array([item.greedy_verdict.reward or 0.0 for item in answered]),
        "mean_of_k": np.array([sum(item.rewards) / len(item.verdicts) for item in answered]),
    }


def truncated(answered: list[Answered]) -> dict[str, float]:
    samples = [completion for item in answered for completion in item.samples]
    return {
        "greedy": float(np.mean([item.greedy.finish_reason == "length" for item in answered])),
        "mean_of_k": float(np.mean([completion.finish_reason == "length" for completion in samples])),
    }


def points(values: list[float]) -> list[float]:
    """[mean, low, high] in percent."""
    return [round(100 * value, 2) for value in values]


def measure(model: Zaya, tokenizer: Any, config: EvalConfig, schemes: list[str]) -> dict[str, Any]:
    """Accuracy of the model and of its quantised forms, and differences to the model."""
    rows: dict[str, Any] = {}
    reference: dict[str, np.ndarray] = {}
    for name in ("bfloat16", *schemes):
        start = time.perf_counter()
        form = model if name == "bfloat16" else quantise_model(copy.deepcopy(model), name)
        reason = CpuRunner.supports(form)
        answered = answer(form, tokenizer, config)
        found = rewards(answered)
        reference = reference or found
        rows[name] = {
            "accuracy": {key: points(mean_with_interval(values)) for key, values in found.items()},
            "difference": {key: points(mean_with_interval(found[key] - reference[key])) for key in found},
            "truncated": {key: round(100 * share, 2) for key, share in truncated(answered).items()},
            "num_problems": len(answered),
            "runner": "kernels" if reason is None else f"PyTorch ({reason})",
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    return rows


def table(rows: dict[str, Any]) -> str:
    """For docs/quantisation.md."""
    lines = [
        "| | greedy | difference | cut off | mean of k samples | difference | cut off |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [f"`{name}`" if name != "bfloat16" else name]
        for key in ("greedy", "mean_of_k"):
            mean, low, high = row["difference"][key]
            difference = "" if name == "bfloat16" else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
            cells += [f"{row['accuracy'][key][0]:.1f} %", difference, f"{row['truncated'][key]:.1f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint directory or hub id, not quantised")
    parser.add_argument("--quick", action="store_true", help="does it run: a small random model, a few short answers")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--seed", type=int, default=20261)
    parser.add_argument("--per-cell", type=int, default=12, help="problems a family and difficulty")
    parser.add_argument("--k", type=int, default=8, help="samples a problem")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    arguments = parser.parse_args()
    for scheme in arguments.schemes:
        QuantScheme.parse(scheme)
    if arguments.quick:
        arguments.per_cell, arguments.k, arguments.max_new_tokens = 1, 2, 16
        arguments.model = tempfile.mkdtemp()
        initialize_checkpoint("smoke", Path(arguments.model), seed=0)
    elif not arguments.model:
        parser.error("give --model, or --quick")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = EvalConfig(
        seed=arguments.seed, per_cell=arguments.per_cell, k=arguments.k, max_new_tokens=arguments.max_new_tokens
    )
    environment = describe_environment()
    model = hf.load(arguments.model, dtype="bfloat16")
    rows = measure(model, load_tokenizer(arguments.model), config, arguments.schemes)
    result = {
        "date": datetime.date.today().isoformat(),
        "model": {"name": "/".join(Path(arguments.model).parts[-3:]), "num_parameters": model.config.num_parameters()},
        "seed": config.seed,
        "per_cell": config.per_cell,
        "k": config.k,
        "max_new_tokens": config.max_new_tokens,
        "threads": torch.get_num_threads(),
        "environment": {key: value for key, value in environment.items() if key != "arguments"},
        "results": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if not arguments.json:
        print(table(rows))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

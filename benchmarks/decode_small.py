"""Decoding steps of a small model: how long one takes, and how much of it is C++ and how much Python.

    python benchmarks/decode_small.py [MODEL] [--sequences 1 16 64 256] [--tokens N] [--rounds N] [--threads N]

MODEL is a checkpoint directory, by default the recipes' nano model, or its shape with random weights where it is not
there. Each of so many sequences has its own random prompt and draws ``tokens`` tokens at temperature 1; only steps with
one token of every sequence count, and of these the fastest tenth of all rounds, for other work on the machine only ever
adds. ``C++`` is the call of the step's kernel, ``Python`` the rest of the step: planning, records, the draw, text.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from decode import RESULTS, machine, random_prompts

from openzaya.infer.cpu_runner import CpuRunner
from openzaya.infer.engine import Engine
from openzaya.infer.sampling import SamplingParams
from openzaya.model.config import preset
from openzaya.model.transformer import Zaya

NANO = RESULTS.parent.parent / "runs/nano/04-sft/model"
PROMPT_TOKENS = 100
UNUSED_IDS = 5
"""Control tokens of the recipes' tokenizer."""


@dataclass(frozen=True)
class Step:
    """Milliseconds of a decoding step, and tokens a second that follow from it."""

    sequences: int
    step_ms: float
    kernel_ms: float
    python_ms: float
    tokens_per_second: float


class Timed:
    """Measures the steps of an engine: (tokens, seconds of the step, seconds of them in C++)."""

    def __init__(self, engine: Engine):
        runner, loop = engine._runner, engine._loop
        assert isinstance(runner, CpuRunner), "the kernels cannot run this model here"
        self.steps: list[tuple[int, float, float]] = []
        self._kernel, self._step = runner._call, loop._step
        self._seconds, self._tokens = 0.0, 0
        runner._call, loop._step = self._timed_kernel, self._timed_step  # type: ignore[method-assign]

    def _timed_kernel(self, work):
        start = time.perf_counter()
        result = self._kernel(work)
        self._seconds, self._tokens = self._seconds + time.perf_counter() - start, work.tokens
        return result

    def _timed_step(self) -> None:
        self._seconds, start = 0.0, time.perf_counter()
        self._step()
        self.steps.append((self._tokens, time.perf_counter() - start, self._seconds))


def measure(model: Zaya | str, vocab_size: int, sequences: int, tokens: int, rounds: int) -> Step:
    params = [
        SamplingParams(temperature=1, max_new_tokens=tokens, ignore_eos=True, seed=seed) for seed in range(sequences)
    ]
    with Engine(model, max_running=sequences) as engine:
        timed = Timed(engine)
        for index in range(rounds):
            prompts = random_prompts(sequences, PROMPT_TOKENS, index)
            ids = [[UNUSED_IDS + token % (vocab_size - UNUSED_IDS) for token in prompt] for prompt in prompts]
            engine.generate(ids, params)
    decoding = [(step, kernel, step - kernel) for count, step, kernel in timed.steps if count == sequences]
    step, kernel, python = (
        statistics.mean(sorted(times)[: len(times) // 10 + 1]) for times in zip(*decoding, strict=True)
    )
    return Step(sequences, 1000 * step, 1000 * kernel, 1000 * python, sequences / step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint directory")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = arguments.model or (str(NANO) if NANO.is_dir() else None)
    model: Zaya | str = path or Zaya(preset("nano"), seed=0)
    vocab_size = (
        preset("nano").vocab_size
        if path is None
        else json.loads((Path(path) / "config.json").read_text())["vocab_size"]
    )
    found = []
    for sequences in arguments.sequences:
        found.append(measure(model, vocab_size, sequences, arguments.tokens, arguments.rounds))
        last = found[-1]
        print(
            f"{sequences:4d} sequences: {last.step_ms:.2f} ms a step, {last.kernel_ms:.2f} C++ and "
            f"{last.python_ms:.2f} Python; {last.tokens_per_second:,.0f} tokens/s"
        )
    print(json.dumps({"model": path or "nano, random", **machine(), "steps": [asdict(step) for step in found]}))


if __name__ == "__main__":
    main()

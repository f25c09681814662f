"""Speed of Markovian RSA in our engine, against the same tokens generated one candidate after another.

    python benchmarks/rsa_speed.py [MODEL] [--layers N] [--rounds N] [--beta N] [--tau N] [--threads N] [--quick]

One run has the default shape, N = 16 candidates, C = 4 tails a prompt, T = 2 aggregation rounds, with scaled budgets:
each candidate is exactly beta tokens long and leaves its last tau tokens (beta / 4, as 16K and 4K). Prompts are token
ids: a question of random ones, and before each tail a short label, with the subsets and the order of openzaya/ttc.
Measured in turn, in one process, on the same prompts:

    together      each generation of 16 submitted to the engine at once: one batch, common beginnings run once
    one by one    a plain loop: one candidate at a time, its whole prompt each time (prefix cache off, max_running 1)
    with cache    the same loop with the prefix cache on

MODEL is a checkpoint directory, by default the recipes' nano model, or its shape with random weights where it is not
there. With ``--layers`` the shape of ZAYA1-8B with so many layers is built instead: random int4 weights, each token's
experts drawn uniformly, the most likely token taken and random tails carried (random weights give flat distributions
and everywhere the same text); 40 layers are the model.

``served`` is the share of the aggregation prompts' tokens that were not run, because others had run them; ``allowed``
what the tree of all prompts' tokens allows. Random weights say nothing about quality, nor does this. The last line is
one JSON object; the nano model and 40 layers are also written to benchmarks/results/rsa_speed.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from decode import RESULTS, UniformExperts, machine, our_model, random_prompts

from openzaya.infer.blocks import num_blocks_for
from openzaya.infer.engine import Engine
from openzaya.infer.sampling import SamplingParams
from openzaya.model.config import preset
from openzaya.model.transformer import Zaya
from openzaya.ttc.subsets import canonical_order, derive_seed, draw_subsets, shared_share

NUM_CANDIDATES, NUM_TAILS, NUM_ROUNDS = 16, 4, 2
LABEL = 3
"""Tokens before each tail."""
NANO = RESULTS.parent.parent / "runs/nano/04-sft/model"


@dataclass(frozen=True)
class Shape:
    """What is run on what."""

    name: str
    model: Zaya | str
    vocab_size: int
    is_random: bool
    """Weights and tails are random, and the most likely token is taken."""
    question: int
    beta: int
    tau: int

    @property
    def longest(self) -> int:
        return self.question + NUM_TAILS * (LABEL + self.tau) + self.beta

    def engine(self, max_running: int, *, prefix_cache: bool = True) -> Engine:
        # The cache also keeps what has ended: twice the candidates' own blocks.
        num_blocks = 2 * max_running * num_blocks_for(self.longest)
        if not self.is_random:
            return Engine(self.model, max_running=max_running, prefix_cache=prefix_cache)
        assert isinstance(self.model, Zaya)
        runner = UniformExperts(self.model, num_blocks, max_running)
        return Engine(self.model, runner=runner, max_running=max_running, prefix_cache=prefix_cache)

    def params(self, seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=0 if self.is_random else 1, max_new_tokens=self.beta, ignore_eos=True, seed=seed
        )


@dataclass(frozen=True)
class Generation:
    """The prompts of one round, and what each candidate draws from."""

    prompts: list[list[int]]
    seeds: list[int]


@dataclass(frozen=True)
class Timing:
    """One way to run all generations of a run."""

    seconds: float
    prompt_tokens_run: int
    cached_tokens: int
    generated_tokens: int


@contextlib.contextmanager
def measured(engine: Engine, found: list[Timing]) -> Iterator[None]:
    """Append what the engine did inside."""
    before, start = engine.stats(), time.perf_counter()
    yield
    seconds, after = time.perf_counter() - start, engine.stats()
    names = ("prompt_tokens", "cached_tokens", "tokens_generated")
    found.append(Timing(seconds, *(getattr(after, name) - getattr(before, name) for name in names)))


def aggregation_prompts(question: list[int], tails: Sequence[list[int]], seed: int, index: int) -> list[list[int]]:
    subsets = canonical_order(draw_subsets(NUM_CANDIDATES, NUM_TAILS, seed, index))
    labels = [[5 + place] * LABEL for place in range(NUM_TAILS)]
    return [
        question + [token for label, slot in zip(labels, subset, strict=True) for token in label + tails[slot]]
        for subset in subsets
    ]


def run_together(shape: Shape, engine: Engine, seed: int) -> tuple[list[Generation], list[Timing]]:
    """All rounds; a timing for each."""
    question = random_tokens(shape, 1, shape.question, seed)[0]
    prompts, generations, timings = [question] * NUM_CANDIDATES, [], []
    for index in range(NUM_ROUNDS + 1):
        seeds = [derive_seed(seed, index, slot) for slot in range(NUM_CANDIDATES)]
        generations.append(Generation(prompts, seeds))
        with measured(engine, timings):
            outputs = engine.generate(prompts, [shape.params(one) for one in seeds])
        tails = [output.completions[0].tokens[-shape.tau :] for output in outputs]
        if shape.is_random:
            tails = random_tokens(shape, NUM_CANDIDATES, shape.tau, seed + index + 1)
        prompts = aggregation_prompts(question, tails, seed, index + 1)
    return generations, timings


def run_one_by_one(shape: Shape, engine: Engine, generations: list[Generation]) -> Timing:
    found: list[Timing] = []
    with measured(engine, found):
        for generation in generations:
            for prompt, seed in zip(generation.prompts, generation.seeds, strict=True):
                engine.generate([prompt], shape.params(seed))
    return found[0]


def random_tokens(shape: Shape, num: int, length: int, seed: int) -> list[list[int]]:
    return [[5 + token % (shape.vocab_size - 5) for token in tokens] for tokens in random_prompts(num, length, seed)]


def allowed_share(generations: list[Generation]) -> float:
    """Of the aggregation prompts' tokens, those that the tree of all prompts up to then holds already."""

    def tree_size(parts: list[Generation]) -> float:
        prompts = [prompt for part in parts for prompt in part.prompts]
        return (1 - shared_share(prompts)) * sum(map(len, prompts))

    num_tokens = sum(len(prompt) for part in generations[1:] for prompt in part.prompts)
    return 1 - (tree_size(generations) - tree_size(generations[:1])) / num_tokens


def one_run(shape: Shape, engines: tuple[Engine, Engine, Engine], seed: int) -> dict[str, Any]:
    together, plain, cached = engines
    generations, timings = run_together(shape, together, seed)
    one_by_one, with_cache = (run_one_by_one(shape, engine, generations) for engine in (plain, cached))
    seconds = sum(timing.seconds for timing in timings)
    num_aggregation = sum(len(prompt) for part in generations[1:] for prompt in part.prompts)
    served = sum(timing.cached_tokens for timing in timings[1:]) / num_aggregation
    allowed = allowed_share(generations)
    generated = {sum(timing.generated_tokens for timing in timings), one_by_one.generated_tokens}
    assert generated == {with_cache.generated_tokens}, "the three ways generate equally many tokens"
    return {
        "ratio": one_by_one.seconds / seconds,
        "ratio_with_cache": with_cache.seconds / seconds,
        "seconds": seconds,
        "one_by_one_seconds": one_by_one.seconds,
        "with_cache_seconds": with_cache.seconds,
        "served": served,
        "allowed": allowed,
        "served_of_allowed": served / allowed,
        "generated_tokens": one_by_one.generated_tokens,
        "prompt_tokens": one_by_one.prompt_tokens_run,
        "prompt_tokens_run": sum(timing.prompt_tokens_run for timing in timings),
        "prompt_tokens_run_with_cache": with_cache.prompt_tokens_run,
        "generations": [asdict(timing) for timing in timings],
    }


def make_shape(arguments: argparse.Namespace) -> Shape:
    if arguments.layers:
        beta = arguments.beta or 128
        config = preset("zaya1-8b").with_changes(num_hidden_layers=arguments.layers)
        model: Zaya | str = our_model(config, "int4")
        return Shape("zaya1-8b", model, config.vocab_size, True, 64, beta, arguments.tau or beta // 4)
    beta = arguments.beta or 192
    path = arguments.model or (str(NANO) if NANO.is_dir() else None)
    if path is not None:
        with Engine(path, max_running=1) as engine:
            model, config = engine._model, engine.config
        return Shape("nano", model, config.vocab_size, False, 48, beta, arguments.tau or beta // 4)
    config = preset("nano")
    return Shape("nano, random", Zaya(config, seed=0), config.vocab_size, True, 48, beta, arguments.tau or beta // 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint directory")
    parser.add_argument("--layers", type=int, default=0, help="the shape of ZAYA1-8B with so many layers instead")
    parser.add_argument("--rounds", type=int, default=3, help="runs, each with another question; medians are reported")
    parser.add_argument("--beta", type=int, default=0, help="tokens of a candidate; default 192, with --layers 128")
    parser.add_argument("--tau", type=int, default=0, help="tokens of a tail; default beta / 4")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--quick", action="store_true", help="one round of 16 tokens a candidate")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.rounds, arguments.beta = 1, arguments.beta or 16
    shape = make_shape(arguments)
    rounds = []
    with (
        shape.engine(NUM_CANDIDATES) as together,
        shape.engine(1, prefix_cache=False) as plain,
        shape.engine(1) as cached,
    ):
        for engine in (together, plain, cached):
            engine.generate(random_tokens(shape, 1, 64, 0), SamplingParams(max_new_tokens=2, ignore_eos=True))  # warm
        for index in range(arguments.rounds):
            rounds.append(one_run(shape, (together, plain, cached), 100 * (index + 1)))
            if not arguments.json:
                record = {key: value for key, value in rounds[-1].items() if key != "generations"}
                print(f"round {index + 1}/{arguments.rounds}: {record}", file=sys.stderr)
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0] if key != "generations"}
    result = {
        "shape": {"name": shape.name, "layers": arguments.layers or None, "n": NUM_CANDIDATES, "c": NUM_TAILS}
        | {"t": NUM_ROUNDS, "question": shape.question, "beta": shape.beta, "tau": shape.tau, "label": LABEL},
        "rounds": len(rounds),
        **machine(),
        "summary": medians,
    }
    if not arguments.json:
        print(
            f"{shape.name}: {medians['generated_tokens']} tokens in {medians['seconds']:.1f} s; one by one "
            f"{medians['ratio']:.2f}x longer, with the prefix cache {medians['ratio_with_cache']:.2f}x\n"
            f"of the aggregation prompts {medians['served']:.1%} was served, the tree allows {medians['allowed']:.1%}: "
            f"{medians['served_of_allowed']:.1%} of it"
        )
    if not arguments.quick and shape.name != "nano, random" and arguments.layers in (0, 40):
        write(shape.name, {**result, "all_rounds": rounds})
    print(json.dumps(result))


def write(name: str, result: dict[str, Any]) -> None:
    """Put this shape's record beside the others'."""
    path: Path = RESULTS / "rsa_speed.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(records | {name: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""RL on the CPU: OpenZAYA's loop against TRL's GRPOTrainer, one step of each in turn.

    python benchmarks/rl_step.py [MODEL] [--shape P,G,T ...] [--rounds N] [--threads N] [--experts NAME ...]
                                 [--micro-batches N ...] [--workers N] [--whole] [--quick] [--json]

A step rolls out G responses of up to T tokens to each of P prompts, judges them, and updates the policy once. Both
sides start from the same checkpoint (a random model of the ``nano`` preset, unless MODEL is given; one that
transformers loads), in fp32, get the same prompts in the same order, the same verifier (even sum of characters, which
about half of anything passes, so every response is trained on), GRPO advantages, no KL term, Dr-GRPO's sum over tokens.
Lengths are real: a response ends with its turn, and tokens are counted up to there. With ``--whole``, or without MODEL,
no turn ends before T tokens on either side: nothing is padded then, and no place in a batch runs empty.

    ours    the loop as the recipes run it: one process, in turns; router replay, DPPO's mask against the sampler's log
            probabilities, Muon without momentum and AdamW, engine-trainer agreement measured every step. With
            ``--workers N`` the rollouts are made by N processes of one thread each, still in turns with the learner
    TRL     ``model.generate`` for all rollouts at once with a cache, fused AdamW; no gradient checkpointing, entropy or
            logs; no log probabilities of the sampler, as its default makes do without for one update a batch. Each of
            ``--experts`` with each of ``--micro-batches`` is tried for a step, and the fastest is timed

Rollout tokens/s are sampled tokens over the seconds from prompts to rollouts: ours with judging, TRL's without. Steps/h
are whole steps. Ratios of CPU time (of all threads) are printed beside them where one process does it all: a machine's
other work hardly changes these, and they say nothing of how well threads are used. With ``--workers`` the CPU seconds
of ours are the learner's alone. Steps of the two sides alternate; the first of each is not counted. TRL is not among
OpenZAYA's dependencies: ``pip install trl accelerate datasets``, beside it or in an environment of its own.

The last line is one JSON object; a run without --quick also enters it in benchmarks/results/rl_step.json, as ``real``
or ``whole``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.serve_load import circumstances
from openzaya.data.tokenizer import load_tokenizer, train_tokenizer
from openzaya.environments.base import Environment, Task
from openzaya.environments.registry import ProblemsSpec
from openzaya.kernels.host import keep_freed_memory
from openzaya.model import hf
from openzaya.model.config import preset
from openzaya.model.transformer import Zaya
from openzaya.problems import TRAINED_FAMILIES, Verdict, make_problem
from openzaya.rl import pool as pool_module
from openzaya.rl.loop import RLRun
from openzaya.rl.recipe import RLConfig
from openzaya.rl.rollout import prompt_of

RESULTS = Path(__file__).parent / "results"
NUM_TASKS = 256
LEARNING_RATE = 3e-4
NEVER = 10**6
Shape = tuple[int, int, int]
"""Prompts a step, rollouts a prompt, tokens a rollout."""
SHAPES: tuple[Shape, ...] = ((1, 8, 512), (4, 8, 64), (8, 16, 128), (16, 16, 192))
"""The first is what TRL's GRPOConfig has by default, the last that of the nano recipe's warm-up."""


def passes(text: str) -> bool:
    """The verifier of both sides."""
    return sum(map(ord, text)) % 2 == 0


class ParityEnvironment(Environment):
    """Prompts of the built-in families; right is what nobody can know."""

    name = "parity"

    def task(self, difficulty: int, number: int) -> Task:
        family = TRAINED_FAMILIES[number % len(TRAINED_FAMILIES)]
        problem = make_problem(family, number // len(TRAINED_FAMILIES) % 8, 3, number % NUM_TASKS, "train")
        return Task(self.name, difficulty, number, [{"role": "user", "content": problem.prompt}], None)

    def verify(self, task: Task, response: str) -> Verdict:
        return Verdict(float(passes(response)), "")


class ParitySpec(ProblemsSpec):
    """Stands where a recipe names environments."""

    def make(self) -> list[Environment]:
        return [ParityEnvironment()]


def write_model(directory: Path) -> Path:
    """A random model of the ``nano`` preset, with a tokenizer of its own."""
    texts = [ParityEnvironment().task(0, number).messages[0]["content"] for number in range(NUM_TASKS)]
    tokenizer = train_tokenizer(texts, preset("nano").vocab_size)
    config = preset("nano").with_changes(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    hf.save(Zaya(config, seed=0), directory / "00-start/model", layout="native", tokenizer=tokenizer)
    return directory / "00-start/model"


class Side:
    """Steps of one side, one at a time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.rollout_seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.rollout_cpu_seconds: list[float] = []
        self.tokens: list[int] = []
        self.reward: list[float] = []

    @contextlib.contextmanager
    def timed(self, seconds: list[float], cpu_seconds: list[float]) -> Iterator[None]:
        """Wall and CPU time of what happens within, that of all threads."""
        begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
        yield
        seconds.append(time.perf_counter() - begun_s)
        cpu_seconds.append(time.process_time() - begun_cpu_s)

    def row(self) -> dict[str, Any]:
        """Medians over all steps but the first."""
        rates = [tokens / taken for tokens, taken in zip(self.tokens, self.rollout_seconds, strict=True)][1:]
        return {
            "rollout_tokens_per_s": statistics.median(rates),
            "steps_per_h": 3600 / statistics.median(self.seconds[1:]),
            "step_s": [round(value, 3) for value in self.seconds[1:]],
            "rollout_s": [round(value, 3) for value in self.rollout_seconds[1:]],
            "step_cpu_s": [round(value, 3) for value in self.cpu_seconds[1:]],
            "rollout_cpu_s": [round(value, 3) for value in self.rollout_cpu_seconds[1:]],
            "tokens_a_step": statistics.median(self.tokens),
            "mean_reward": statistics.mean(self.reward),
        }


class Ours(Side):
    """OpenZAYA's loop."""

    def __init__(self, model: Path, shape: Shape, workers: int) -> None:
        super().__init__()
        num_prompts, group, num_tokens = shape
        values: dict[str, Any] = {
            "model": {"start_from": str(model)},
            "steps": NEVER,
            "prompts_per_step": num_prompts,
            "sources": [{"name": "parity", "environments": [ParitySpec()], "difficulties": (0, 0)}],
            "rollout": {"group_size": group, "max_new_tokens": num_tokens, "canary": "off"},
            "algorithm": {"advantage": "grpo", "drop_equal_groups": False},
            "pipeline": {"workers": workers, "publish_every": 1, "max_staleness": 0},
            "optimizer": {
                "muon_learning_rate": LEARNING_RATE,
                "adamw_learning_rate": LEARNING_RATE,
                "momentum": 0.0,
                "weight_decay": 0.0,
                "newton_schulz_dtype": "auto",
                "warmup_steps": 0,
            },
            "window_tokens": max(512, num_tokens + 256),
        }
        self._run = RLRun(RLConfig(**values), model.parent)
        self._run.begin(model / "no-checkpoints")
        next_groups = self._run.collector.next_groups

        def collect(step: int) -> Any:
            with self.timed(self.rollout_seconds, self.rollout_cpu_seconds):
                return next_groups(step)

        self._run.collector.next_groups = collect

    def prompts(self, num: int) -> list[list[int]]:
        """Tokens of the first ``num`` prompts that the loop will ask."""
        environment = ParityEnvironment()
        return [prompt_of(environment.task(0, number), self._run.tokenizer) for number in range(num)]

    def step(self) -> None:
        with self.timed(self.seconds, self.cpu_seconds):
            metrics = self._run.train_step()
        self.tokens.append(int(metrics["rl/sampled_tokens"]))
        self.reward.append(float(metrics["rl/reward"]))

    def close(self) -> None:
        self._run.close()


@contextlib.contextmanager
def whole_lengths() -> Iterator[None]:
    """Within, rollouts of ours go on to their longest length."""
    original = pool_module.sampling_params
    pool_module.sampling_params = lambda order, config: original(order, config).model_copy(update={"ignore_eos": True})
    try:
        yield
    finally:
        pool_module.sampling_params = original


def run_peer(
    model: Path,
    shape: Shape,
    prompts: list[list[int]],
    experts: str,
    micro_batches: int,
    num_steps: int,
    between: Callable[[], None],
    *,
    whole: bool,
) -> Side:
    """``num_steps`` steps of TRL's trainer; ``between`` is called after each, outside the time taken."""
    import datasets
    import transformers
    import trl

    num_prompts, group, num_tokens = shape
    side, tokenizer = Side(), load_tokenizer(model)
    texts = [tokenizer.decode(tokens) for tokens in prompts]
    if any(tokenizer(text)["input_ids"] != tokens for text, tokens in zip(texts, prompts, strict=True)):
        raise SystemExit("a prompt is other tokens after decoding; the two sides would not do the same work")

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self._open = contextlib.ExitStack()

        def _begin(self) -> None:
            self._open.enter_context(side.timed(side.seconds, side.cpu_seconds))

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self._open.close()
            between()
            if len(side.seconds) < num_steps:
                self._begin()

    class Trainer(trl.GRPOTrainer):
        def _generate_single_turn(self, *arguments: Any, **settings: Any) -> Any:
            with side.timed(side.rollout_seconds, side.rollout_cpu_seconds):
                found = super()._generate_single_turn(*arguments, **settings)
            side.tokens.append(sum(map(len, found[0])))
            return found

    def reward(completions: list[str], **_: Any) -> list[float]:
        rewards = [float(passes(text)) for text in completions]
        side.reward.append(statistics.mean(rewards))
        return rewards

    policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy.set_experts_implementation(experts)
    rollouts = num_prompts * group
    generation = {"use_cache": True} | ({"suppress_tokens": [tokenizer.eos_token_id]} if whole else {})
    with tempfile.TemporaryDirectory() as directory:
        arguments = trl.GRPOConfig(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            max_steps=num_steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            per_device_train_batch_size=rollouts // micro_batches,
            gradient_accumulation_steps=micro_batches,
            steps_per_generation=micro_batches,
            num_generations=group,
            max_completion_length=num_tokens,
            generation_kwargs=generation,
            loss_type="dr_grpo",
            scale_rewards="group",
            beta=0.0,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=policy,
            reward_funcs=reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return side


def measure(
    model: Path, shape: Shape, choices: list[tuple[str, int]], rounds: int, *, whole: bool = False, workers: int = 0
) -> dict[str, Any]:
    """One shape: steps of both sides in turn, TRL with the choice whose second step is the fastest."""
    num_steps = rounds + 1
    with whole_lengths() if whole else contextlib.nullcontext():
        ours = Ours(model, shape, workers)
        try:
            prompts = ours.prompts(shape[0] * num_steps)
            choices = [choice for choice in choices if shape[0] * shape[1] % choice[1] == 0] or [(choices[0][0], 1)]
            tried = {
                choice: run_peer(model, shape, prompts[: 2 * shape[0]], *choice, 2, lambda: None, whole=whole).seconds[
                    1
                ]
                for choice in (choices if len(choices) > 1 else [])
            }
            experts, micro_batches = min(choices, key=lambda choice: tried.get(choice, 0))
            peer = run_peer(model, shape, prompts, experts, micro_batches, num_steps, ours.step, whole=whole)
        finally:
            ours.close()
    longest = shape[0] * shape[1] * shape[2]
    for name, side in (("openzaya", ours), ("TRL", peer)):
        fits = all(tokens == longest if whole else tokens <= longest for tokens in side.tokens)
        if not fits or len(side.seconds) != num_steps:
            raise SystemExit(f"{name} made {side.tokens} tokens in {len(side.seconds)} steps; {longest} each are whole")
    rows = {"openzaya": ours.row(), "trl": peer.row()}

    def cpu_ratio(name: str) -> float:
        return statistics.median(rows["trl"][name]) / statistics.median(rows["openzaya"][name])

    return {
        "prompts": shape[0],
        "group": shape[1],
        "new_tokens": shape[2],
        "whole_lengths": whole,
        "trl_settings": {"experts": experts, "micro_batches": micro_batches},
        **rows,
        "workers": workers,
        "rollout_cpu_ratio": None if workers else cpu_ratio("rollout_cpu_s"),
        "step_cpu_ratio": None if workers else cpu_ratio("step_cpu_s"),
        "rollout_ratio": rows["openzaya"]["rollout_tokens_per_s"] / rows["trl"]["rollout_tokens_per_s"],
        "steps_ratio": rows["openzaya"]["steps_per_h"] / rows["trl"]["steps_per_h"],
    }


def versions() -> dict[str, str]:
    """Of what is measured; ends the program where TRL is missing."""
    try:
        return {name: version(name) for name in ("trl", "accelerate", "datasets", "transformers", "torch")}
    except PackageNotFoundError as error:
        raise SystemExit(
            f"{error.name} is not installed. TRL is only needed here: pip install trl accelerate datasets (in an "
            "environment of its own: python -m venv --system-site-packages DIRECTORY)"
        ) from None


def shape_of(text: str) -> Shape:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts) or int(parts[1]) < 2:
        raise argparse.ArgumentTypeError(f"{text}: give prompts,rollouts,tokens, such as 16,16,192; rollouts 2 or more")
    return int(parts[0]), int(parts[1]), int(parts[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a checkpoint with a tokenizer, in the native layout")
    parser.add_argument("--shape", type=shape_of, nargs="+", metavar="P,G,T")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--experts", nargs="+", default=["grouped_mm", "eager"], help="of transformers")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4], help="of a step of TRL")
    parser.add_argument("--workers", type=int, default=0, help="rollout processes of ours; not with --whole")
    parser.add_argument("--whole", action="store_true", help="every rollout has T tokens")
    parser.add_argument("--quick", action="store_true", help="one small shape, one round; writes no file")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: give 1 or more")
    whole = arguments.whole or arguments.model is None
    if arguments.workers < 0 or (arguments.workers and whole):
        parser.error(
            f"--workers {arguments.workers}: give 0 or more, and with rollout processes a MODEL without --whole"
        )
    if arguments.quick:
        arguments.rounds, arguments.micro_batches = 1, [1]
        arguments.shape = arguments.shape or [(4, 4, 32)]
    arguments.shape = arguments.shape or list(SHAPES)
    found = versions()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    silence()
    choices = list(itertools.product(arguments.experts, arguments.micro_batches))
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or write_model(Path(directory))
        for shape in arguments.shape:
            rows.append(measure(model, shape, choices, arguments.rounds, whole=whole, workers=arguments.workers))
            if not arguments.json:
                print_row(rows[-1])
    result = circumstances() | {"versions": found, "threads": arguments.threads, "rounds": arguments.rounds}
    result |= {"model": arguments.model.name if arguments.model else "random nano", "shapes": rows}
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "rl_step.json"
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(records | {"whole" if whole else "real": result}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def silence() -> None:
    """Keep the output to the figures."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def print_row(row: dict[str, Any]) -> None:
    settings = "{experts}, {micro_batches} micro-batches".format(**row["trl_settings"])
    print(f"{row['prompts']} prompts x {row['group']} rollouts x up to {row['new_tokens']} tokens      TRL: {settings}")
    for name in ("openzaya", "trl"):
        side = row[name]
        print(
            f"    {name:10}{side['rollout_tokens_per_s']:12,.0f} rollout tokens/s{side['steps_per_h']:12,.0f} steps/h"
            f"    {side['tokens_a_step']:,.0f} tokens a step"
        )
    print(f"    ratio     {row['rollout_ratio']:12.1f}{row['steps_ratio']:29.1f}")
    if not row["workers"]:
        print(f"    CPU time  {row['rollout_cpu_ratio']:12.1f}{row['step_cpu_ratio']:29.1f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Evaluation on held-out procedural problems: greedy, avg@k, pass@k, majority@k, truncation rate.

For each family and difficulty ``per_cell`` problems of the held-out split are drawn; each is answered once
greedily and k times at the recipe's temperature. avg@k is the mean reward of the k samples, pass@k the share of
problems with a correct sample, majority@k the reward of the most frequent answer (ties: the earliest). A verifier
without a verdict leaves its response out, and is counted; a number with nothing behind it is null. Responses that
reached the token limit are truncated.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerFast

from openzaya.data.chat import render
from openzaya.errors import DataError
from openzaya.infer.generate import Completion, complete, engine_for
from openzaya.infer.sampling import SamplingParams
from openzaya.intervals import mean_with_interval
from openzaya.model.transformer import Zaya
from openzaya.problems import NEVER_TRAINED, TRAINED_FAMILIES, Problem, Verdict, get_family, make_problem
from openzaya.problems.verify import split_response

SAMPLES_KEPT = 4
"""Responses a family, difficulty and kind (right, wrong) that are kept for reading."""


class EvalConfig(BaseModel):
    """What is asked, how often, and how answers are sampled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["eval"] = "eval"
    model: str = ""
    """An earlier stage's directory name, a checkpoint directory or a hub id."""
    families: list[str] = [*TRAINED_FAMILIES, NEVER_TRAINED]
    easy: tuple[int, int] = (0, 3)
    """Lowest and highest difficulty of the easy half."""
    hard: tuple[int, int] = (4, 7)
    per_cell: int = Field(12, ge=1)
    """Problems a family and difficulty."""
    k: int = Field(8, ge=1)
    """Samples a problem."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    seed: int = 0
    split: Literal["train", "heldout"] = "heldout"
    strict: bool = False
    """Also demand the solver's own reasoning."""
    max_rows: int = Field(256, ge=1)
    """Rows decoded together."""
    threads: int = Field(0, ge=0)


@dataclass(frozen=True)
class Answered:
    """One problem with everything that was answered to it; rewards are None without a verdict."""

    problem: Problem
    greedy: Completion
    greedy_verdict: Verdict
    samples: list[Completion]
    verdicts: list[Verdict]
    responses: list[str]
    greedy_response: str

    @property
    def rewards(self) -> list[float]:
        return [verdict.reward for verdict in self.verdicts if verdict.reward is not None]


@dataclass(frozen=True)
class Score:
    """What the answers to one problem are worth; None where no verdict stands behind a number."""

    greedy: float | None
    average: float | None
    """Mean reward of the samples."""
    majority: float | None
    passed: float | None
    truncated: float
    """Share of the samples."""
    right_tokens: float | None
    """Mean length of the samples that are right; None without one."""
    num_no_verdict: int
    num_tokens: int
    """Generated for the problem."""


def score(item: Answered) -> Score:
    """The numbers of one problem, of which all tables are means."""
    right = [
        len(completion.tokens)
        for completion, verdict in zip(item.samples, item.verdicts, strict=True)
        if verdict.reward == 1
    ]
    rewards = item.rewards
    return Score(
        greedy=item.greedy_verdict.reward,
        average=float(np.mean(rewards)) if rewards else None,
        majority=_majority_reward(item) if rewards else None,
        passed=max(rewards) if rewards else None,
        truncated=float(np.mean([c.finish_reason == "length" for c in item.samples])) if item.samples else 0.0,
        right_tokens=float(np.mean(right)) if right else None,
        num_no_verdict=sum(verdict.reward is None for verdict in [item.greedy_verdict, *item.verdicts]),
        num_tokens=sum(len(completion.tokens) for completion in [item.greedy, *item.samples]),
    )


def evaluate(
    model: Zaya,
    tokenizer: PreTrainedTokenizerFast,
    config: EvalConfig,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the evaluation; returns the content of ``eval.json`` and of ``samples.jsonl``.

    ``progress`` is called with (what, prompts done, prompts in all).
    """
    started = time.perf_counter()
    problems = draw_problems(config)
    answered = answer(model, tokenizer, problems, config, progress=progress)
    return summarise(answered, config, time.perf_counter() - started), keep_samples(answered, config)


def answer(
    model: Zaya,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    config: EvalConfig,
    *,
    first: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Answered]:
    """Ask ``problems`` once greedily and ``config.k`` times, and judge the answers.

    ``first`` is the number of the first of them in an evaluation that is done in parts: it decides the seeds, so parts
    give what the whole gives. ``progress`` as for :func:`evaluate`.
    """
    prompts = [
        render([{"role": "user", "content": problem.prompt}], tokenizer, add_generation_prompt=True).tokens
        for problem in problems
    ]
    too_long = max(len(prompt) for prompt in prompts)
    if too_long >= model.config.max_position_embeddings:
        raise DataError(
            f"a prompt has {too_long} tokens, the model {model.config.max_position_embeddings} positions; "
            "ask lower difficulties, or raise max_position_embeddings"
        )

    def report(what: str) -> Callable[[int, int], None]:
        return lambda done, _: progress(what, done, len(prompts)) if progress else None

    shared = {"max_new_tokens": config.max_new_tokens, "seed": config.seed + first * config.k}
    greedy_params = SamplingParams(temperature=0, top_p=1, **shared)
    sampled_params = SamplingParams(temperature=config.temperature, top_p=config.top_p, **shared)
    # One engine for both: the prompts of the samples then come from its prefix cache.
    num_rows = min(config.max_rows, len(prompts) * config.k)
    with engine_for(model, prompts, sampled_params, num_rows) as engine:
        greedy = complete(engine, prompts, greedy_params, progress=report("greedy"))
        sampled = complete(engine, prompts, sampled_params, config.k, report(f"{config.k} samples"))
    return [
        judge(problem, greedy[i][0], sampled[i], tokenizer, strict=config.strict) for i, problem in enumerate(problems)
    ]


def draw_problems(config: EvalConfig) -> list[Problem]:
    """The problems asked, without repetitions where a family has enough of them."""
    difficulties = sorted({*range(config.easy[0], config.easy[1] + 1), *range(config.hard[0], config.hard[1] + 1)})
    problems: list[Problem] = []
    for family in config.families:
        get_family(family)
        for difficulty in difficulties:
            seen: dict[str, Problem] = {}
            for index in range(8 * config.per_cell):
                problem = make_problem(family, difficulty, config.seed, index, config.split)
                seen.setdefault(problem.canonical, problem)
                if len(seen) == config.per_cell:
                    break
            problems += seen.values()
    if not problems:
        raise DataError(
            f"families={config.families}, easy={config.easy} and hard={config.hard} ask nothing; name at least one "
            "family, and difficulties as (lowest, highest)"
        )
    return problems


def judge(
    problem: Problem,
    greedy: Completion,
    samples: Sequence[Completion],
    tokenizer: PreTrainedTokenizerFast,
    *,
    strict: bool = False,
) -> Answered:
    """Decode and verify the answers to one problem."""
    family = get_family(problem.family)
    responses = [str(tokenizer.decode(completion.tokens)) for completion in samples]
    greedy_response = str(tokenizer.decode(greedy.tokens))
    verdicts = [family.verify(problem, response, strict=strict) for response in responses]
    greedy_verdict = family.verify(problem, greedy_response, strict=strict)
    return Answered(problem, greedy, greedy_verdict, list(samples), verdicts, responses, greedy_response)


def summarise(answered: Sequence[Answered], config: EvalConfig, seconds: float) -> dict[str, Any]:
    """The content of ``eval.json``."""
    trained = [item for item in answered if item.problem.family != NEVER_TRAINED]
    easy = range(config.easy[0], config.easy[1] + 1)
    hard = range(config.hard[0], config.hard[1] + 1)
    groups = {
        "easy": [item for item in trained if item.problem.difficulty in easy],
        "hard": [item for item in trained if item.problem.difficulty in hard],
        "all": trained,
        "never_trained": [item for item in answered if item.problem.family == NEVER_TRAINED],
    }
    families: dict[str, dict[str, Any]] = {}
    for family in dict.fromkeys(item.problem.family for item in answered):
        cells = families.setdefault(family, {})
        for difficulty in sorted({item.problem.difficulty for item in answered if item.problem.family == family}):
            cell = [i for i in answered if i.problem.family == family and i.problem.difficulty == difficulty]
            cells[str(difficulty)] = _cell(cell)
    return {
        **config.model_dump(mode="json", exclude={"kind", "threads", "max_rows"}),
        "seconds": round(seconds, 1),
        "generated_tokens": sum(score(item).num_tokens for item in answered),
        "no_verdict": sum(score(item).num_no_verdict for item in answered),
        "groups": {name: _group(items) for name, items in groups.items() if items},
        "families": families,
    }


def summarise_scores(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over problems as [mean, low, high], None where no problem has the number."""
    return {
        "n": len(scores),
        "avg_at_k": _interval(one.average for one in scores),
        "greedy": _interval(one.greedy for one in scores),
        "pass_at_k": _interval(one.passed for one in scores),
        "majority_at_k": _interval(one.majority for one in scores),
        "truncation_rate": float(np.mean([one.truncated for one in scores])) if scores else 0.0,
        "length_right_tokens": _interval(one.right_tokens for one in scores),
    }


def _group(items: Sequence[Answered]) -> dict[str, Any]:
    return {
        **summarise_scores([score(item) for item in items]),
        "difficulties": sorted({item.problem.difficulty for item in items}),
        "families": list(dict.fromkeys(item.problem.family for item in items)),
    }


def _interval(per_problem: Iterable[float | None]) -> list[float] | None:
    values = [value for value in per_problem if value is not None]
    return mean_with_interval(values) if values else None


def _cell(items: Sequence[Answered]) -> dict[str, Any]:
    group = _group(items)

    def mean(key: str) -> float | None:
        return None if group[key] is None else group[key][0]

    return {
        "n": group["n"],
        "greedy": mean("greedy"),
        "avg": mean("avg_at_k"),
        "pass_k": mean("pass_at_k"),
        "majority": mean("majority_at_k"),
        "truncated": group["truncation_rate"],
    }


def _majority_reward(item: Answered) -> float:
    """Reward of the most frequent answer text among the samples that have one."""
    answers = [
        (answer, verdict.reward)
        for response, verdict in zip(item.responses, item.verdicts, strict=True)
        if verdict.reward is not None and (answer := split_response(response)[1])
    ]
    if not answers:
        return 0.0
    most_frequent = Counter(answer for answer, _ in answers).most_common(1)[0][0]
    return next(reward for answer, reward in answers if answer == most_frequent)


def keep_samples(answered: Sequence[Answered], config: EvalConfig) -> list[dict[str, Any]]:
    """A few right and wrong responses of each family and difficulty, for people to read."""
    kept: list[dict[str, Any]] = []
    counts: Counter[tuple[str, int, float]] = Counter()
    for item in answered:
        gold = get_family(item.problem.family).solve(item.problem).answer
        candidates = [(item.greedy, item.greedy_verdict, item.greedy_response, 0.0)]
        candidates += [
            (completion, verdict, response, config.temperature)
            for completion, verdict, response in zip(item.samples, item.verdicts, item.responses, strict=True)
        ]
        for completion, verdict, response, temperature in candidates:
            if verdict.reward is None:
                continue
            key = (item.problem.family, item.problem.difficulty, verdict.reward)
            if counts[key] >= SAMPLES_KEPT:
                continue
            counts[key] += 1
            kept.append(
                {
                    "family": item.problem.family,
                    "difficulty": item.problem.difficulty,
                    "prompt": item.problem.prompt,
                    "gold": gold,
                    "response": response,
                    "reward": verdict.reward,
                    "reason": verdict.reason,
                    "temperature": temperature,
                    "truncated": completion.finish_reason == "length",
                }
            )
    return kept

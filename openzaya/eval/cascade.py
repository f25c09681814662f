"""The cascade's table: every stage's model on the same held-out problems (as table IX of arXiv 2605.05365).

    row            avg@k at temperature 1, greedy, majority@k, pass@k, truncation, length of right answers
    instructions   share of held-out tasks whose answer is right and takes all forms that were asked
    RSA            the last model with Markovian RSA on some of the problems, beside its single rollouts on the same

Greedy, majority and pass stand beside avg@k because RL that only lowers the temperature raises avg@k and none of them.
Rows answer the same problems, so they are compared problem by problem (``openzaya/intervals.py``). The length of right
answers is compared on problems that both models solve: a better model also solves longer ones.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from openzaya.data.aggregation import PromptStyle
from openzaya.environments.base import Task
from openzaya.environments.instructions import InstructionEnvironment
from openzaya.errors import ConfigError
from openzaya.eval.benchmarks import EvalConfig, Score, draw_problems, summarise_scores
from openzaya.eval.cascade_jobs import InstructionScore, Job, Outcome, RSAScore, run_jobs
from openzaya.eval.cascade_rsa import summarise_rsa
from openzaya.intervals import mean_with_interval, paired_difference
from openzaya.problems import NEVER_TRAINED, TRAINED_FAMILIES, Problem
from openzaya.runlog import format_duration, write_json, write_text_atomically
from openzaya.ttc.config import RSAConfig

JOBS_A_PROCESS = 4
"""Of each checkpoint and kind: enough for an even end, few enough to decode many rows together."""
SAMPLES_KEPT = 2
"""Right and wrong responses of each model and family that are kept for reading."""
COMPARED = {"avg_at_k": "average", "greedy": "greedy", "majority_at_k": "majority", "pass_at_k": "passed"}
"""Columns of the table -> fields of :class:`Score`."""

Progress = Callable[[str], None]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InstructionTest(_Section):
    """Held-out tasks of the instruction environment."""

    tasks: int = Field(192, ge=1)
    """Spread evenly over the difficulties."""
    k: int = Field(4, ge=1)
    """Samples a task."""
    difficulties: tuple[int, int] = (0, 5)
    families: list[str] = list(TRAINED_FAMILIES)
    num_forms: tuple[int, int] = (1, 3)
    forms: list[str] = []


class RSATest(_Section):
    """Markovian RSA on top of the last model."""

    problems: int = Field(144, ge=1)
    """Taken evenly from those of the table."""
    n: int = Field(16, ge=1)
    c: int = Field(4, ge=1)
    t: int = Field(2, ge=1)
    beta: int = Field(192, ge=1)
    tau: int = Field(64, ge=0)
    final_budget: int = Field(224, ge=1)
    """As many as ``max_new_tokens`` gives single rollouts: the last round is compared with them."""
    answer_budget: int = Field(32, ge=1)
    prompt_style: PromptStyle = "short"

    def config(self, temperature: float, top_p: float, seed: int) -> RSAConfig:
        """The run's settings."""
        values = self.model_dump(exclude={"problems"})
        sampling = {"temperature": temperature, "top_p": top_p}
        return RSAConfig.model_validate(values | {"sampling": sampling, "seed": seed, "select": "majority"})


class CascadeConfig(_Section):
    """Which checkpoints, and what they are asked."""

    kind: Literal["cascade"] = "cascade"
    models: list[str] = Field(min_length=1)
    """In the order of the cascade: earlier stages, checkpoint directories or hub ids."""
    baselines: list[str] = []
    """Models beside the cascade: each is compared with the cascade's last one."""
    labels: dict[str, str] = {}
    """Model -> its name in the table; by default the model as it is given."""
    families: list[str] = list(TRAINED_FAMILIES)
    difficulties: tuple[int, int] = (0, 7)
    per_cell: int = Field(8, ge=1)
    """Problems a family and difficulty."""
    k: int = Field(16, ge=1)
    """Samples a problem."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(224, ge=1)
    instructions: InstructionTest | None = None
    rsa: RSATest | None = None
    seed: int = 7
    """Of problems and samples; one that no other stage uses."""
    max_rows: int = Field(256, ge=1)
    """Rows that a process decodes together."""
    processes: int = Field(0, ge=0)
    """0: one a core."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        every = [*self.models, *self.baselines]
        if len(set(every)) < len(every):
            raise ValueError(f"models and baselines name one twice: {', '.join(every)}; leave one out")
        if unknown := set(self.labels) - set(every):
            raise ValueError(f"labels for {', '.join(sorted(unknown))}, which no row has; the models are {every}")
        if NEVER_TRAINED in self.families and len(self.families) > 1:
            raise ValueError(f"families mix {NEVER_TRAINED}, which is never trained on, with others; ask it alone")
        return self

    def label(self, model: str) -> str:
        """Its name in the table."""
        return self.labels.get(model, model)

    def questions(self, **changes: Any) -> EvalConfig:
        """The same as one model's evaluation."""
        low, high = self.difficulties
        shared = ("families", "per_cell", "k", "temperature", "top_p", "max_new_tokens", "seed", "max_rows")
        values = {name: getattr(self, name) for name in shared}
        return EvalConfig.model_validate(values | {"easy": (low, high), "hard": (low, high)} | changes)


@dataclass
class _Row:
    """What a model has answered so far, aligned with the questions."""

    scores: list[Score | None]
    instructions: list[InstructionScore | None]
    rsa: list[RSAScore | None]
    samples: list[dict[str, Any]] = field(default_factory=list)


def evaluate_cascade(
    config: CascadeConfig, paths: Mapping[str, str], *, progress: Progress | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The content of ``cascade.json``, ``samples.jsonl`` and ``problems.jsonl``.

    Args:
        paths: model -> its checkpoint.
        progress: told a line after each part.

    Raises:
        OpenZayaError: a checkpoint that cannot be read; questions that do not fit it; nothing to ask.
    """
    started = time.perf_counter()
    models = [*config.models, *config.baselines]
    problems = draw_problems(config.questions())
    tasks = instruction_tasks(config.instructions, config.seed) if config.instructions is not None else []
    subset = evenly(len(problems), config.rsa.problems) if config.rsa is not None else []
    processes = config.processes or _num_cores()
    jobs = _jobs(config, paths, problems, tasks, subset, processes)
    rows = [_Row([None] * len(problems), [None] * len(tasks), [None] * len(subset)) for _ in models]
    watch = _Watch(config, jobs, progress or (lambda line: None))
    for job, outcome in run_jobs(jobs, min(processes, len(jobs))):
        _enter(rows[job.row], job, outcome)
        watch.ended(job)
    result = _content(config, models, problems, subset, rows) | {"seconds": round(time.perf_counter() - started, 1)}
    samples = [sample | {"model": config.label(models[i])} for i, row in enumerate(rows) for sample in row.samples]
    return result, samples, _problem_lines(config, models, problems, subset, rows)


def instruction_tasks(test: InstructionTest, seed: int) -> list[Task]:
    """Tasks whose problems are in the held-out split."""
    low, high = test.difficulties
    if low > high or low < 0:
        raise ConfigError(f"instructions.difficulties={test.difficulties}; give (lowest, highest), 0 or more")
    environment = InstructionEnvironment(
        test.families, num_forms=test.num_forms, forms=test.forms, seed=seed, split="heldout"
    )
    levels = range(low, high + 1)
    return [environment.task(levels[number % len(levels)], number) for number in range(test.tasks)]


def evenly(total: int, wanted: int) -> list[int]:
    """``wanted`` of the numbers below ``total``, at even distances; all of them where there are no more."""
    wanted = min(total, wanted)
    return [index * total // wanted for index in range(wanted)]


def _jobs(
    config: CascadeConfig,
    paths: Mapping[str, str],
    problems: Sequence[Problem],
    tasks: Sequence[Task],
    subset: Sequence[int],
    processes: int,
) -> list[Job]:
    """All of one checkpoint after the other, so that a process seldom loads another one."""
    questions = config.questions()
    jobs: list[Job] = []

    def add(kind: Literal["problems", "instructions", "rsa"], row: int, model: str, asked: Sequence[Any]) -> None:
        settings = questions
        if kind == "instructions" and config.instructions is not None:
            settings = config.questions(k=config.instructions.k)
        run = None
        if kind == "rsa" and config.rsa is not None:
            run = config.rsa.config(config.temperature, config.top_p, config.seed)
        size = max(1, -(-len(asked) // (JOBS_A_PROCESS * processes)))
        for first in range(0, len(asked), size):
            jobs.append(Job(kind, row, paths[model], first, tuple(asked[first : first + size]), settings, run))

    for row, model in enumerate([*config.models, *config.baselines]):
        add("problems", row, model, problems)
        add("instructions", row, model, tasks)
        if row == len(config.models) - 1:
            add("rsa", row, model, [problems[index] for index in subset])
    return jobs


def _enter(row: _Row, job: Job, outcome: Outcome) -> None:
    of_kind: dict[str, list[Any]] = {"problems": row.scores, "instructions": row.instructions, "rsa": row.rsa}
    of_kind[job.kind][job.first : job.first + len(outcome.scores)] = outcome.scores
    row.samples += outcome.samples


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Watch:
    """Says how far it is, and how long it will take."""

    def __init__(self, config: CascadeConfig, jobs: Sequence[Job], say: Progress) -> None:
        self._labels = [config.label(model) for model in [*config.models, *config.baselines]]
        self._left = Counter((job.row, job.kind) for job in jobs)
        self._total, self._done = sum(job.num_rollouts for job in jobs), 0
        self._say, self._began = say, time.perf_counter()

    def ended(self, job: Job) -> None:
        self._done += job.num_rollouts
        self._left[job.row, job.kind] -= 1
        left = (time.perf_counter() - self._began) / self._done * (self._total - self._done)
        part = "done" if self._left[job.row, job.kind] == 0 else f"{self._left[job.row, job.kind]} parts left"
        share = f"{self._done:,} of {self._total:,} rollouts"
        self._say(f"cascade: {self._labels[job.row]}, {job.kind}: {part}; {share}, ETA {format_duration(left)}")


# --- numbers --------------------------------------------------------------------------------------


def _content(
    config: CascadeConfig, models: Sequence[str], problems: Sequence[Problem], subset: Sequence[int], rows: list[_Row]
) -> dict[str, Any]:
    last = len(config.models) - 1
    scores = [[one for one in row.scores if one is not None] for row in rows]
    tokens = [one.num_tokens for row in rows for part in (row.scores, row.instructions, row.rsa) for one in part if one]
    pairs = [(row - 1, row) for row in range(1, last + 1)]
    pairs += [(0, last)] if last > 1 else []
    pairs += [(row, last) for row in range(last + 1, len(rows))]
    kept = {"models", "baselines", "labels", "kind", "max_rows", "processes", "rsa"}
    return {
        **config.model_dump(mode="json", exclude=kept),
        "n": len(problems),
        "generated_tokens": sum(tokens),
        "rows": [
            {
                "label": config.label(model),
                "model": model,
                "role": "cascade" if row <= last else "baseline",
                **summarise_scores(scores[row]),
                "no_verdict": sum(one.num_no_verdict for one in scores[row]),
                "instructions": _instructions(rows[row]),
                "by_family": _averages(problems, scores[row], lambda problem: problem.family),
                "by_difficulty": _averages(problems, scores[row], lambda problem: str(problem.difficulty)),
            }
            for row, model in enumerate(models)
        ],
        "comparisons": [
            {
                "before": config.label(models[before]),
                "after": config.label(models[after]),
                **compare(scores[before], scores[after]),
                "instructions": paired_difference(*(_strict(rows[row]) for row in (before, after))),
            }
            for before, after in pairs
        ],
        "rsa": _rsa(config, [scores[last][index] for index in subset], rows[last]) if subset else None,
    }


def compare(before: Sequence[Score], after: Sequence[Score]) -> dict[str, list[float] | None]:
    """Paired differences ``after - before`` of each column, as [mean, low, high]."""
    found = {
        column: paired_difference(*([getattr(one, name) for one in row] for row in (before, after)))
        for column, name in COMPARED.items()
    }
    lengths = ([one.right_tokens for one in row] for row in (before, after))
    return found | {"length_right_tokens": paired_difference(*lengths)}


def _strict(row: _Row) -> list[float | None]:
    return [one.strict for one in row.instructions if one is not None]


def _instructions(row: _Row) -> dict[str, Any] | None:
    found = [one for one in row.instructions if one is not None]
    if not found:
        return None
    strict = [one.strict for one in found if one.strict is not None]
    followed = [one.followed for one in found if one.followed is not None]
    return {
        "n": len(found),
        "strict": mean_with_interval(strict) if strict else None,
        "followed": mean_with_interval(followed) if followed else None,
    }


def _averages(
    problems: Sequence[Problem], scores: Sequence[Score], key: Callable[[Problem], str]
) -> dict[str, float | None]:
    found: dict[str, list[float]] = {key(problem): [] for problem in problems}
    for problem, one in zip(problems, scores, strict=True):
        if one.average is not None:
            found[key(problem)].append(one.average)
    return {name: sum(values) / len(values) if values else None for name, values in found.items()}


def _rsa(config: CascadeConfig, single: Sequence[Score], row: _Row) -> dict[str, Any]:
    return {
        "label": f"{config.label(config.models[-1])} + Markovian RSA",
        "settings": config.rsa.model_dump(mode="json") if config.rsa is not None else {},
        **summarise_rsa(single, [one for one in row.rsa if one is not None]),
    }


# --- files ----------------------------------------------------------------------------------------


def _problem_lines(
    config: CascadeConfig,
    models: Sequence[str],
    problems: Sequence[Problem],
    subset: Sequence[int],
    rows: Sequence[_Row],
) -> list[dict[str, Any]]:
    """Every problem with each row's numbers, for comparisons that nobody thought of yet."""
    with_rsa = dict(zip(subset, rows[len(config.models) - 1].rsa, strict=True))
    lines = []
    for index, problem in enumerate(problems):
        numbers = {config.label(model): rows[row].scores[index] for row, model in enumerate(models)}
        found = {
            label: {name: getattr(one, name) for name in ("average", "greedy", "majority", "passed", "right_tokens")}
            for label, one in numbers.items()
            if one is not None
        }
        place = {"family": problem.family, "difficulty": problem.difficulty}
        rsa = with_rsa.get(index)
        extra = {"rsa": {"rounds": list(rsa.rounds), "majority": rsa.majority, "passed": rsa.passed}} if rsa else {}
        lines.append({**place, "prompt": problem.prompt, "rows": found, **extra})
    return lines


def write_cascade(
    directory: Path, result: dict[str, Any], samples: list[dict[str, Any]], problems: list[dict[str, Any]]
) -> None:
    """``cascade.json``, ``samples.jsonl`` and ``problems.jsonl`` in ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    counts: Counter[tuple[str, str, float]] = Counter()
    kept = []
    for sample in samples:
        key = (sample["model"], sample["family"], sample["reward"])
        counts[key] += 1
        if sample["reward"] is not None and counts[key] <= SAMPLES_KEPT:
            kept.append(sample)
    for name, lines in (("samples.jsonl", kept), ("problems.jsonl", problems)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text_atomically(directory / name, text)
    write_json(directory / "cascade.json", result)


def print_progress(line: str) -> None:
    """On stderr."""
    print(line, file=sys.stderr, flush=True)
